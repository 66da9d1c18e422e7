"""What rounding reads as KL: measured on the built-in example, in every precision."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl_ray.config import LoraConfig, Precision, SamplerConfig, ScalingConfig, TrainConfig
from ctrl_ray.distributed import noise_floor
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.distributed.noise_floor import (
    TRUE_KL,
    add_noise_floor,
    check_target_kl,
    measure_noise_floor,
    near_reference,
)
from ctrl_ray.errors import ConfigError, NonFiniteError
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.controlled import ControlledPolicy
from tests.configs import shapes_of_the_paper
from tests.policies import make_policy

SHORT = SamplerConfig(num_steps=4, reference_steps=1)
CONFIG = dataclasses.replace(shapes_of_the_paper(), sampler=SHORT, global_batch_size=65, micro_batch_size_per_worker=5)


def _learner(config: TrainConfig) -> Learner:
    """With the bare policy in the engine's place, and no rewards."""
    policy = build_policy(config).eval()
    return Learner(
        config=config,
        engine=policy,  # type: ignore[arg-type]
        kernel=policy.backbone.make_kernel(config.sampler),
        encoder=policy.backbone.load_encoder(),
        rewards=None,  # type: ignore[arg-type]
        controls=config.controls,
        prompts=("a red circle", "a blue cross"),
        rank=Rank(0, 1, torch.device("cpu")),
    )


@functools.cache
def _measured(precision: Precision, sampler: SamplerConfig = SHORT) -> tuple[float, float]:
    """(floor, amplitude of the policy that it was read from)."""
    seen: list[float] = []
    real = noise_floor._reading

    def spy(learner: Learner, amplitude: float) -> float:
        seen.append(amplitude)
        return real(learner, amplitude)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noise_floor, "_reading", spy)
        scaling = dataclasses.replace(CONFIG.scaling, precision=precision)
        floor = measure_noise_floor(_learner(dataclasses.replace(CONFIG, scaling=scaling, sampler=sampler)))
    return floor, seen[-1]


@pytest.mark.full
@pytest.mark.parametrize(
    ("precision", "sampler", "low", "high"),
    [
        ("bf16", SHORT, 0.0015, 0.01),
        ("fp16", SHORT, 1e-4, TRUE_KL),
        ("fp32", SHORT, 1e-4, TRUE_KL),
        ("bf16", shapes_of_the_paper().sampler, 0.004, 0.01),
        ("fp16", shapes_of_the_paper().sampler, 1e-4, TRUE_KL),
    ],
)
def test_it_is_what_precision_adds(precision: Precision, sampler: SamplerConfig, low: float, high: float) -> None:
    """Of a policy whose true KL, in float32, is below TRUE_KL whatever the precision that found it: bf16 reads several times
    as much, and no precision reads 0."""
    floor, amplitude = _measured(precision, sampler)
    assert low < floor < high
    exact = noise_floor._reading(_learner(dataclasses.replace(CONFIG, sampler=sampler)), amplitude)
    assert 0.1 * TRUE_KL < exact < TRUE_KL


@pytest.mark.full
def test_it_is_reduced_as_the_runs_kl_is() -> None:
    """'mean': over 4 × 8 × 8 latent dimensions."""
    floor = measure_noise_floor(_learner(dataclasses.replace(CONFIG, latent_reduction="mean")))
    assert floor == pytest.approx(_measured("fp32")[0] / 256, rel=1e-3)


def _state(policy: ControlledPolicy) -> Mapping[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


@pytest.mark.parametrize("lora", [LoraConfig(rank=2), None])
def test_the_policy_is_near_the_reference_and_then_itself_again(tiny_pipeline: Path, lora: LoraConfig | None) -> None:
    """Wherever training has brought it: by parameters, and after an error too."""
    policy = make_policy(tiny_pipeline, {"size": 3}, lora=lora)
    for parameter in policy.trainable_parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    trained = _state(policy)
    with pytest.raises(KeyError), near_reference(policy, 1e-3, seed=0):
        near = _state(policy)
        raise KeyError
    after = _state(policy)
    assert all(torch.equal(trained[name], after[name]) for name in trained)
    with near_reference(policy, 2e-3, seed=0):
        further = _state(policy)
    for name, parameter in policy.trainable_parameters().items():
        if "lora_A" in name:
            assert torch.equal(near[name], trained[name])
        elif lora is None and not name.startswith("controls."):
            pretrained = near[f"reference_denoiser.{name.partition('.')[2]}"]
            assert (near[name] - pretrained).abs().max() <= 6e-3 * pretrained.abs().max()
            torch.testing.assert_close(further[name] - pretrained, 2 * (near[name] - pretrained), rtol=1e-2, atol=1e-6)
        else:
            assert 0 < near[name].abs().max() < 6e-3 and parameter.requires_grad
            torch.testing.assert_close(further[name], 2 * near[name])
    assert not near["controls.tables.size.weight"][-1].any()


def test_a_kl_that_is_not_a_number_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise_floor, "_reading", lambda learner, amplitude: float("nan"))
    with pytest.raises(NonFiniteError, match=r"is nan in scaling\.precision fp32; expected a positive number"):
        measure_noise_floor(_learner(CONFIG))


def test_a_run_that_goes_on_keeps_its_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured once; anew in another precision; and a target that is too near ends the run before it starts."""
    monkeypatch.setattr(noise_floor, "measure_noise_floor", lambda learner: 0.25)
    learner: Any = SimpleNamespace(config=CONFIG, rank=Rank(0, 1, torch.device("cpu")))
    for known, floor in (
        ({}, 0.25),
        ({"kl_noise_floor": 0.125, "precision": "fp32"}, 0.125),
        ({"kl_noise_floor": 0.125, "precision": "bf16"}, 0.25),
    ):
        progress = {"updates_done": 3, **known}
        add_noise_floor(learner, progress)
        assert progress == {"updates_done": 3, "precision": "fp32", "kl_noise_floor": floor}
    learner.config = dataclasses.replace(CONFIG, target_kl=0.4)
    with pytest.raises(ConfigError, match=r"target_kl is 0\.4 nats"):
        add_noise_floor(learner, {"updates_done": 0})


def test_a_target_below_twice_the_floor_is_refused() -> None:
    """With a number that will do, and a finer precision where there is one."""
    config = dataclasses.replace(CONFIG, target_kl=0.0123, scaling=ScalingConfig(precision="bf16"))
    check_target_kl(config, 0.006)
    check_target_kl(CONFIG, 100.0)  # no target
    with pytest.raises(ConfigError, match=r"target_kl is 0\.0123 nats, .* already reads 0\.0062 .*") as caught:
        check_target_kl(config, 0.0062)
    assert str(caught.value).endswith("Set target_kl to 0.013 or more, or scaling.precision to fp16 or fp32")
    with pytest.raises(ConfigError, match=r"Set target_kl to 0\.021 or more$"):
        check_target_kl(dataclasses.replace(config, scaling=ScalingConfig()), 0.01)
