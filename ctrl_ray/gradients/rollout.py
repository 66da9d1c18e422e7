"""Sampling a trajectory without gradient: from noise to clean latents, every latent kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl_ray.diffusion.noise import draw_noise
from ctrl_ray.diffusion.steps import GaussianStep, Guidance, LatentReduction, StepKernel, gaussian_sample, step_kl
from ctrl_ray.policy.protocol import Condition, Policy

NoiseSource = Callable[[int], Tensor]
"""0: the initial noise; k + 1: the noise of step k; each (B, ...)."""


@dataclass(frozen=True)
class Trajectory:
    """One rolled-out micro-batch. The noise is not kept: it is keyed, and the sweep does not need it."""

    latents: Tensor
    """(T + 1, B, ...) float32: h_0 (initial noise) … h_T (clean latents)."""
    condition: Condition
    labels: Tensor
    """(B, C) int64, null allowed."""
    guidance: Guidance
    kl_per_step: Tensor | None = None
    """(B, T) nats, when it was asked for."""

    @property
    def clean_latents(self) -> Tensor:
        """h_T, (B, ...)."""
        return self.latents[-1]


def keyed_noise(
    seed: int,
    update: int,
    sample_ids: Sequence[int],
    shape: Sequence[int],
    num_steps: int,
    device: str | torch.device = "cpu",
) -> NoiseSource:
    """All noise of a micro-batch's trajectories, the same for a sample on whatever rank it lands."""
    whole = draw_noise(seed, update, sample_ids, "trajectory", (num_steps + 1, *shape), device=device)
    return lambda index: whole[:, index]


@torch.no_grad()
def rollout(
    policy: Policy,
    kernel: StepKernel,
    condition: Condition,
    labels: Tensor,
    guidance: Guidance,
    noise: NoiseSource,
    *,
    reference: bool = False,
    with_kl: bool = False,
    latent_reduction: LatentReduction = "sum",
) -> Trajectory:
    """Sample x_T → x_0 under the policy (or, with `reference`, under the pre-trained model).

    Steps that the kernel does not let the policy control (no density, or the last `reference_steps`) are taken by the
    reference: they are a fixed part of the reward. with_kl also runs the reference at every step and keeps the KL, (B, T)
    in nats.
    """
    latents = noise(0)
    kept = [latents]
    kls = []
    for step_index in range(kernel.num_steps):
        by_reference = reference or not kernel.controlled(step_index)
        step = policy_step(policy, kernel, step_index, latents, condition, labels, guidance, reference=by_reference)
        if with_kl:
            kls.append(latents.new_zeros(len(latents)))
            if not by_reference:
                ref = policy_step(policy, kernel, step_index, latents, condition, labels, guidance, reference=True)
                kls[-1] = step_kl(step, ref, latent_reduction)
        latents = gaussian_sample(step, noise(step_index + 1)) if kernel.std(step_index) > 0 else step.mean
        kept.append(latents)
    return Trajectory(torch.stack(kept), condition, labels, guidance, torch.stack(kls, dim=1) if with_kl else None)


def policy_step(
    policy: Policy,
    kernel: StepKernel,
    step_index: int,
    latents: Tensor,
    condition: Condition,
    labels: Tensor,
    guidance: Guidance,
    *,
    reference: bool,
) -> GaussianStep:
    """Law of the next latents under the policy or the reference."""
    output = policy(latents, kernel.time(step_index), condition, labels, guidance, reference=reference)
    return kernel.step(step_index, latents, output)
