"""A card computes what the CPU computes: updates, evaluations, rewards, images; and what holds to the bit on one device."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl_ray import embedded
from ctrl_ray.config import AdapterConfig, EstimatorConfig, LoraConfig, SamplerConfig, ScalingConfig, TrainConfig
from ctrl_ray.diffusion.steps import Guidance
from ctrl_ray.distributed.evaluate import evaluate_policy
from ctrl_ray.distributed.method import make_method
from ctrl_ray.gradients.rollout import NoiseSource, keyed_noise, rollout
from ctrl_ray.pipeline import ControlledPipeline
from ctrl_ray.policy.adapter import make_adapter_info, save_adapter
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.rewards.model import load_reward_model
from ctrl_ray.rewards.spec import RewardModelSpec
from tests.configs import shapes_of_the_paper
from tests.gpu.support import CPU, PRECISIONS, difference, move_off_reference
from tests.gradients import full_pass
from tests.learners import PROMPTS, learner_on, small_config
from tests.policies import make_policy

Measured = Callable[..., None]


@pytest.fixture(scope="module")
def config(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Three guided steps and one of the reference, whose noise is so small that its KL's gradient is mostly rounding."""
    config = small_config(tiny_pipeline, tmp_path_factory.mktemp("numbers") / "classifier")
    return dataclasses.replace(config, sampler=SamplerConfig(num_steps=4, guidance_scale=2.0, reference_steps=1))


def _updated(config: TrainConfig, device: torch.device) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What one update of SGD, away from the pre-trained model, changes and tells."""
    learner = learner_on(config, device, pool=False)
    policy: Any = learner.engine.policy
    move_off_reference(policy)
    before = {name: parameter.detach().clone() for name, parameter in policy.trainable_parameters().items()}
    row = make_method(config).update(learner, 0)
    changes = {name: p.detach() - before[name] for name, p in policy.trainable_parameters().items()}
    return changes, {name: value for name, value in row.items() if not name.endswith("_s")}


@pytest.mark.parametrize(
    "estimator", ["full", "sticking_the_landing", "last_k", "random_suffix", "adjoint_matching", "reinforce"]
)
def test_an_update_is_that_of_the_cpu(
    config: TrainConfig, estimator: Any, device: torch.device, measured: Measured
) -> None:
    """Float32, SGD: the change of the parameters to 1e-4 (relative L2), the metrics to 1e-4."""
    config = dataclasses.replace(config, estimator=EstimatorConfig(name=estimator, steps=2), group_size=3)
    (expected, expected_row), (got, row) = _updated(config, CPU), _updated(config, device)
    measured(difference=difference(got, expected))
    assert difference(got, expected) <= 1e-4
    assert row == pytest.approx(expected_row, rel=1e-4, abs=1e-6)


def _objective(policy: Any, kernel: Any, inputs: Inputs, noise: NoiseSource, weights: Tensor) -> float:
    trajectory = rollout(policy, kernel, inputs, noise, with_kl=True)
    assert trajectory.kl_per_step is not None
    return float((weights * (0.7 * trajectory.kl_per_step.sum(1) - _reward(trajectory.clean_latents))).sum())


def _reward(latents: Tensor) -> Tensor:
    return torch.tanh(latents).pow(3).flatten(1).sum(1)


def test_gradients_are_finite_differences(tiny_pipeline: Path, device: torch.device, measured: Measured) -> None:
    """Float64, guided, one sample without a label, along a random direction of all parameters: 1e-6 relative."""
    policy = make_policy(tiny_pipeline, {"size": 4}, lora=LoraConfig(rank=2)).double().to(device)
    move_off_reference(policy)
    kernel = policy.backbone.make_kernel(SamplerConfig(num_steps=3))
    condition = policy.backbone.load_encoder(device).encode(PROMPTS)
    assert condition.null_tensors is not None
    condition = dataclasses.replace(
        condition,
        tensors={name: tensor.double() for name, tensor in condition.tensors.items()},
        null_tensors={name: tensor.double() for name, tensor in condition.null_tensors.items()},
    )
    inputs = Inputs(condition, torch.tensor([[1], [4]], device=device), Guidance(1.7))
    drawn = keyed_noise(0, 0, [0, 1], policy.latent_shape, kernel.num_steps, device)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64, device=device)

    def noise(index: int) -> Tensor:
        return drawn(index).double()

    trajectory = rollout(policy, kernel, inputs, noise)
    clean = trajectory.clean_latents.clone().requires_grad_(True)
    (cotangent,) = torch.autograd.grad(_reward(clean).sum(), clean)
    full_pass(policy, kernel, trajectory, cotangent, weights, kl_coef=0.7)
    generator = torch.Generator().manual_seed(2)
    slope, values = 0.0, []
    parameters = list(policy.trainable_parameters().values())
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(device) for p in parameters]
    for name, parameter, direction in zip(policy.trainable_parameters(), parameters, directions, strict=True):
        if name.startswith("controls."):
            direction[-1] = 0  # the null row is no parameter
        assert parameter.grad is not None
        slope += float((parameter.grad * direction).sum())
    size = 1e-5
    for factor in (size, -2 * size):
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.data += factor * direction
        values.append(_objective(policy, kernel, inputs, noise, weights))
    found = (values[0] - values[1]) / (2 * size)
    measured(difference=abs(found / slope - 1))
    assert found == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("pool", [False, True], ids=["local", "pool"])
def test_an_evaluation_is_that_of_the_cpu(config: TrainConfig, pool: bool, device: torch.device) -> None:
    """With rewards on the device and on the CPU: KL exactly 0 at the start, log-probabilities to 1e-4."""
    expected, got = (
        evaluate_policy(learner_on(config, where, pool=pool), config.evaluation.num_samples) for where in (CPU, device)
    )
    assert got["kl"] == 0.0
    assert got["log_prob/jpeg_size"] == pytest.approx(expected["log_prob/jpeg_size"], rel=1e-4)
    assert got["num_samples"] == config.evaluation.num_samples


@pytest.mark.parametrize("precision", PRECISIONS)
def test_policy_and_reference_are_equal_at_the_start(precision: Any, device: torch.device) -> None:
    """To the bit, with LoRA on every layer of the shipped pipeline, guided, with labels and without; with label gains a
    sample without a label stays equal once training has moved them."""
    labels = torch.tensor([[0], [3], [4]], device=device)
    for kind in ("embedding", "gains"):
        config = dataclasses.replace(
            shapes_of_the_paper(), adapter=AdapterConfig(kind=kind), scaling=ScalingConfig(precision=precision)
        )
        policy = build_policy(config).to(device)
        trained, reference = _predictions(policy, labels)
        assert torch.isfinite(trained).all() and trained.dtype == torch.float32
        assert torch.equal(trained, reference)
    move_off_reference(policy)
    trained, reference = _predictions(policy, labels)
    assert torch.equal(trained[2], reference[2]) and not torch.equal(trained[:2], reference[:2])


@torch.no_grad()
def _predictions(policy: ControlledPolicy, labels: Tensor) -> list[Tensor]:
    """Of the policy and of the reference, guided."""
    condition = policy.backbone.load_encoder(labels.device).encode(["a red circle", "a blue square", ""])
    latents = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0)).to(labels.device)
    inputs = Inputs(condition, labels, Guidance(3.0))
    time = torch.tensor(400, device=labels.device)
    return [policy(latents, time, inputs, reference=reference).prediction for reference in (False, True)]


def test_a_checkpointed_update_is_the_plain_one(config: TrainConfig, device: torch.device, measured: Measured) -> None:
    """Recomputed activations give the same change to 1e-5 (relative L2): kernels may add in another order."""
    checkpointed = dataclasses.replace(config, scaling=ScalingConfig(gradient_checkpointing=True))
    (expected, _), (got, _) = _updated(config, device), _updated(checkpointed, device)
    measured(difference=difference(got, expected))
    assert difference(got, expected) <= 1e-5


def test_a_reward_is_that_of_the_cpu(device: torch.device, measured: Measured) -> None:
    """The shipped decoder and classifier: log-probabilities to 1e-4, their gradient to 1e-4 (relative L2), images to one
    level in 255."""
    latents = torch.randn(5, *load_backbone("shapes").latent_shape, generator=torch.Generator().manual_seed(0))
    request = ("a red circle",) * 5, torch.tensor([[0], [1], [2], [3], [4]]), torch.full((5, 1), 4.0)
    answers, images = [], []
    for where in (CPU, device):
        spec = RewardModelSpec(
            base_model="shapes", classifiers={"jpeg_size": str(embedded.CLASSIFIER)}, device=str(where)
        )
        model = load_reward_model(spec)
        answers.append(model.evaluate(latents.to(where), *request))
        images.append(model.decode(latents.to(where)).int())
    (expected, got), levels = answers, int((images[0] - images[1]).abs().max())
    assert expected.cotangent is not None and got.cotangent is not None
    cotangents = difference({"": got.cotangent}, {"": expected.cotangent})
    measured(cotangents=cotangents, levels=levels)
    torch.testing.assert_close(got.log_probs.cpu(), expected.log_probs, rtol=1e-4, atol=1e-4)
    assert cotangents <= 1e-4 and levels <= 1


def test_a_pipeline_draws_the_images_of_the_cpu(
    config: TrainConfig, tmp_path: Path, device: torch.device, measured: Measured
) -> None:
    """From an adapter, guided, with generators of the CPU: latents to 1e-4 (relative L2), images to one level in 255."""
    policy = build_policy(config)
    move_off_reference(policy)
    info = make_adapter_info(
        base_model=config.base_model,
        base_revision=None,
        controls=config.controls,
        sampler=config.sampler,
        lora=config.lora,
        training={},
    )
    save_adapter(tmp_path, policy, info)
    drawn = []
    for where in (CPU, device):
        pipeline = ControlledPipeline.from_pretrained(tmp_path, device=where)
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        drawn.append(pipeline(list(PROMPTS), controls={"jpeg_size": [0, 3]}, generator=generators, output_type="np"))
    (expected, got), latents = drawn, [{"": images.trajectory.latents} for images in drawn]
    levels = 255 * float(abs(expected.images - got.images).max())
    measured(latents=difference(latents[1], latents[0]), levels=levels)
    assert difference(latents[1], latents[0]) <= 1e-4 and levels <= 1
