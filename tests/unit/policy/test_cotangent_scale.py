"""The scale of fp16's cotangents: without effect on float32, and what keeps fp16's from vanishing."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ctrl_ray.config import LoraConfig, Precision, SamplerConfig
from ctrl_ray.diffusion.steps import Guidance, step_kl
from ctrl_ray.gradients.rollout import keyed_noise, policy_step
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.cotangent_scale import CotangentScale
from ctrl_ray.policy.protocol import Condition, Inputs
from tests.policies import make_policy

RANK_2 = LoraConfig(rank=2)
LABELS = torch.tensor([[0], [1]])
COTANGENT = 1e-7
"""A usual magnitude: one over the batch, the classifier's gradient, the steps' deviations."""


@functools.cache
def _condition(folder: Path) -> Condition:
    return make_policy(folder, {"size": 2}, lora=None).backbone.load_encoder().encode(["a red circle", "a blue cross"])


def _policy(folder: Path, precision: Precision = "fp32", lora: LoraConfig | None = RANK_2) -> ControlledPolicy:
    policy = make_policy(folder, {"size": 2}, lora=lora, precision=precision)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.trainable_parameters().items():
        if lora is not None or name.startswith("controls"):
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return policy


def _gradients(
    policy: ControlledPolicy, folder: Path, num_steps: int = 1, magnitude: float = COTANGENT
) -> list[Tensor]:
    """Of the parameters and of the first latents, through `num_steps` steps and their KLs in one graph."""
    inputs = Inputs(_condition(folder), LABELS, Guidance(1.5))
    kernel = policy.backbone.make_kernel(SamplerConfig(num_steps=3))
    noise = keyed_noise(0, 0, [0, 1], policy.latent_shape, kernel.num_steps)
    first = latents = noise(0).requires_grad_(True)
    loss = torch.zeros(())
    for k in range(num_steps):
        step = policy_step(policy, kernel, k, latents, inputs, reference=False)
        ref = policy_step(policy, kernel, k, latents, inputs, reference=True)
        loss = loss + magnitude * step_kl(step, ref).sum()
        latents = step.mean + step.std * noise(k + 1)
    loss = loss + magnitude * (latents * noise(3)).sum()
    loss.backward()
    gradients = [p.grad for p in (*policy.trainable_parameters().values(), first) if p.grad is not None]
    assert len(gradients) == len(policy.trainable_parameters()) + 1
    return gradients


@pytest.mark.full
@pytest.mark.parametrize(
    ("num_steps", "checkpointed", "lora"),
    [
        (1, False, RANK_2),
        (2, False, None),
        (2, True, RANK_2),
        (2, False, RANK_2),
        (2, True, None),
    ],
)
def test_float32_gradients_are_the_same_to_the_bit(
    tiny_pipeline: Path, num_steps: int, checkpointed: bool, lora: LoraConfig | None
) -> None:
    """One step, two in one graph, and recomputed ones, policy and reference: a power of two rounds nothing."""
    plain, scaled = (_policy(tiny_pipeline, lora=lora) for _ in range(2))
    scaled.enable_cotangent_scaling()
    if checkpointed:
        scaled.enable_gradient_checkpointing()
    expected, got = (_gradients(policy, tiny_pipeline, num_steps) for policy in (plain, scaled))
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in expected)


def _error(gradients: list[Tensor], expected: list[Tensor]) -> float:
    """Of all gradients together, relative."""
    whole, right = (torch.cat([g.flatten() for g in some]) for some in (gradients, expected))
    return float((whole - right).norm() / right.norm())


@pytest.mark.full
@pytest.mark.parametrize("lora", [RANK_2, None])
def test_small_cotangents_survive_in_fp16(
    tiny_pipeline: Path, lora: LoraConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float32: within 1 %, as with cotangents of 1; without the scale hardly anything is right."""
    expected = _gradients(_policy(tiny_pipeline, lora=lora), tiny_pipeline, 2)
    assert _error(_gradients(_policy(tiny_pipeline, "fp16", lora), tiny_pipeline, 2), expected) < 0.01
    monkeypatch.setattr(ControlledPolicy, "enable_cotangent_scaling", lambda policy: None)
    assert _error(_gradients(_policy(tiny_pipeline, "fp16", lora), tiny_pipeline, 2), expected) > 0.1


@pytest.mark.full
def test_every_forward_has_the_scale_of_its_own_cotangent(tiny_pipeline: Path) -> None:
    """A small cotangent of the next forward, or of the reference's, does not vanish behind a large one."""
    inputs = Inputs(_condition(tiny_pipeline), LABELS)
    latents = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def gradients(precision: Precision) -> list[Tensor]:
        policy = _policy(tiny_pipeline, precision)
        found: list[Tensor] = []
        for reference, magnitude in ((False, 1.0), (True, COTANGENT), (False, COTANGENT)):
            prediction = policy(latents, torch.tensor(500), inputs, reference=reference).prediction
            found += torch.autograd.grad(prediction, latents, magnitude * latents.detach())
        return found

    for got, expected in zip(gradients("fp16"), gradients("fp32"), strict=True):
        assert _error([got], [expected]) < 0.02


def test_the_scale_is_a_power_of_two_that_brings_the_largest_to_one() -> None:
    """3 = 1.5 · 2¹, 1e-7 = 1.68 · 2⁻²⁴, 1e-38 (out of the range of scales), 0, and what is not finite."""
    for values, factor in (
        ([-3.0, 1.0], 0.5),
        ([1e-7, 0.0], 2.0**24),
        ([1.0, 0.25], 1.0),
        ([1e-38], 2.0**100),
        ([0.0, 0.0], 1.0),
    ):
        scale = CotangentScale()
        entered = scale.enter(torch.tensor(values))
        assert torch.equal(entered, torch.tensor(values) * factor)
        assert torch.equal(scale.leave(entered), torch.tensor(values))
    for bad in (float("inf"), float("nan")):
        assert not torch.isfinite(CotangentScale().enter(torch.tensor([1.0, bad]))).all()


def test_a_scale_is_chosen_once_until_it_is_forgotten() -> None:
    """By the first cotangent that is not zero."""
    scale = CotangentScale()
    assert scale.enter(torch.zeros(2)).tolist() == [0, 0] and scale.leave(torch.zeros(2)).tolist() == [0, 0]
    assert scale.enter(torch.tensor([4.0])).tolist() == [1.0]
    assert scale.enter(torch.tensor([8.0])).tolist() == [2.0] and scale.leave(torch.tensor([2.0])).tolist() == [8.0]
    scale.forget()
    assert scale.enter(torch.tensor([8.0])).tolist() == [1.0]


def test_zero_and_infinite_cotangents_go_through(tiny_pipeline: Path) -> None:
    """Zeros stay zeros; what is not finite is still there for the adjoint pass to find."""
    policy = _policy(tiny_pipeline)
    policy.enable_cotangent_scaling()
    assert all(not gradient.any() for gradient in _gradients(policy, tiny_pipeline, magnitude=0.0))
    assert not torch.isfinite(_gradients(policy, tiny_pipeline, magnitude=float("inf"))[-1]).any()
