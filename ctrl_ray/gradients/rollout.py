"""Sampling a trajectory without gradient: from noise to clean latents, every latent kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ctrl_ray.diffusion.noise import draw_noise
from ctrl_ray.diffusion.steps import (
    DenoisingKernel,
    GaussianStep,
    LatentReduction,
    StepKernel,
    gaussian_sample,
    step_kl,
    step_log_ratio,
)
from ctrl_ray.policy.protocol import Inputs, Policy, beside_reference
from ctrl_ray.rewards.protocol import Rewards

NoiseSource = Callable[[int], Tensor]
"""0: the initial noise; k + 1: the noise of step k; each (B, ...). Asked once for each, in this order."""


class StepGraph(NamedTuple):
    """One denoising step with what its backward needs."""

    latents: Tensor
    """h_k, (B, ...): a leaf that takes a gradient."""
    step: GaussianStep
    ref: GaussianStep


@dataclass(frozen=True)
class Trajectory:
    """One rolled-out micro-batch. The noise is not kept: it is keyed, and the adjoint pass does not need it."""

    latents: Tensor
    """(T + 1, B, ...) float32: h_0 (initial noise) … h_T (clean latents)."""
    inputs: Inputs
    kl_per_step: Tensor | None = None
    """(B, T) nats, when it was asked for."""
    log_ratio: Tensor | None = None
    """log of the policy's density of the path over the reference's, (B,) float64 in nats, where it or the KL was asked for:
    what the path's weight for the target takes away from its reward (`evaluation.certificate`)."""
    graphs: Mapping[int, StepGraph] = field(default_factory=dict, repr=False)
    """By step index, where the rollout kept them: each serves one backward."""
    means: Tensor | None = None
    """(T, B, ...) float32: the mean of every step's next latents, when it was asked for."""

    @property
    def clean_latents(self) -> Tensor:
        """h_T, (B, ...)."""
        return self.latents[-1]


class Sampler(Protocol):
    """From noise to clean latents: `rollout` is the plain one, a baseline may ask the rewards on its way.

    A sampler is a module's function (or an object that pickles): it travels to Ray workers.
    """

    def __call__(
        self,
        policy: Policy,
        kernel: DenoisingKernel,
        inputs: Inputs,
        noise: NoiseSource,
        rewards: Rewards | None = None,
        *,
        reference: bool = False,
        with_kl: bool = False,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Trajectory:
        """Sample B trajectories; `reference`: of the pre-trained model; `with_kl`: with the KL of each step; `on_step`: told
        each step's index and its next latents."""
        ...


def rows_per_image(draw: Sampler) -> int:
    """Latents that a sampler holds at a time for each image; 1 where it does not say."""
    return int(getattr(draw, "rows_per_image", 1))


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
    inputs: Inputs,
    noise: NoiseSource,
    rewards: Rewards | None = None,
    *,
    reference: bool = False,
    with_kl: bool = False,
    with_log_ratio: bool = False,
    with_graphs: bool = False,
    with_means: bool = False,
    latent_reduction: LatentReduction = "sum",
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Trajectory:
    """Sample x_T → x_0 under the policy (or, with `reference`, under the pre-trained model); a `Sampler`.

    Steps that the kernel does not let the policy control (no density, or the last `reference_steps`) are taken by the
    reference: they are a fixed part of the reward. with_kl also runs the reference at every step and keeps the KL, (B, T)
    in nats, and the path's log-ratio; both are of the model that samples, so of the pre-trained one they are 0.
    with_log_ratio asks for the policy's log-ratio on a path of either model: with `reference` the policy runs too,
    and the sum is of z · u − ½ ‖u‖². with_graphs keeps the graph of every step of the policy, and of the reference beside
    it, so that an adjoint pass computes no forward again; its memory grows with the number of steps. with_means keeps the
    means of all steps, so that an adjoint pass needs one graph at a time.
    on_step(step_index, next_latents) is told each step as it is done. The rewards are not asked.

        noise = keyed_noise(seed, update, sample_ids, policy.latent_shape, kernel.num_steps)
        trajectory = rollout(policy, kernel, Inputs(encoder.encode(prompts), labels), noise, with_kl=True)
        trajectory.clean_latents, trajectory.kl_per_step.sum(1)
    """
    latents = noise(0)
    kept = [latents]
    kls, means = [], []
    log_ratio = None
    graphs = {}
    doubled = beside_reference(policy, inputs) if with_graphs else None
    if with_kl or with_log_ratio:
        log_ratio = torch.zeros(len(latents), dtype=torch.float64, device=latents.device)
    for step_index in range(kernel.num_steps):
        controlled = kernel.controlled(step_index)
        if with_graphs and controlled and not reference:
            graphs[step_index] = graph = step_graph(policy, kernel, step_index, latents, inputs, doubled)
            step = GaussianStep(graph.step.mean.detach(), graph.step.std)
        else:
            step = policy_step(policy, kernel, step_index, latents, inputs, reference=reference or not controlled)
        z = noise(step_index + 1) if kernel.std(step_index) > 0 else None
        kl = latents.new_zeros(len(latents))
        if log_ratio is not None and controlled and (with_log_ratio or not reference):
            other = policy_step(policy, kernel, step_index, latents, inputs, reference=not reference)
            if with_kl and not reference:
                kl = step_kl(step, other, latent_reduction)
            assert z is not None  # the policy takes no step without a density
            log_ratio += step_log_ratio(step, other, z) * (-1 if reference else 1)
        kls.append(kl)
        if with_means:
            means.append(step.mean)
        latents = step.mean if z is None else gaussian_sample(step, z)
        kept.append(latents)
        if on_step is not None:
            on_step(step_index, latents)
    return Trajectory(
        torch.stack(kept),
        inputs,
        torch.stack(kls, dim=1) if with_kl else None,
        log_ratio,
        graphs,
        torch.stack(means) if with_means else None,
    )


def step_graph(
    policy: Policy, kernel: StepKernel, step_index: int, latents: Tensor, inputs: Inputs, doubled: Inputs | None = None
) -> StepGraph:
    """Policy and reference at the same latents, with their graph; by one forward with inputs of `beside_reference`."""
    leaf = latents.detach().requires_grad_(True)
    with torch.enable_grad():
        if doubled is None:
            step, ref = (
                policy_step(policy, kernel, step_index, leaf, inputs, reference=reference)
                for reference in (False, True)
            )
            return StepGraph(leaf, step, ref)
        twice = leaf.repeat(2, *[1] * (leaf.dim() - 1))
        both = policy_step(policy, kernel, step_index, twice, doubled, reference=False)
        (mean, ref_mean), std = both.mean.chunk(2), both.std
        return StepGraph(leaf, GaussianStep(mean, std), GaussianStep(ref_mean, std))


def policy_step(
    policy: Policy, kernel: StepKernel, step_index: int, latents: Tensor, inputs: Inputs, *, reference: bool
) -> GaussianStep:
    """Law of the next latents under the policy or the reference."""
    output = policy(latents, kernel.time(step_index, latents.device), inputs, reference=reference)
    return kernel.step(step_index, latents, output)
