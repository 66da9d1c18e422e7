"""What the fixed step variances of a policy cost, from the curvature of the value along its paths.

The target's steps are the reference's, tilted by the value V of where they lead: to second order around a step's mean they
are Gaussian, with variance σ² / (1 − λ) along an eigenvector of σ² ∇²V with eigenvalue λ. A policy moves the mean and keeps
σ. The best that it can do is short of the target by their KL divergence,

    cost_k = ½ Σ_i (−λ_i − log(1 − λ_i)) = log E e^R − E R,      R(z) = (V(μ + σ z) + V(μ − σ z)) / 2 − V(μ).

The second form takes values at mirrored next latents, in which nothing is left that a mean can follow; no λ has to be small. It
serves the last step that the policy takes, after which V is known: it is the log tilt where the reference's steps lead (here
without their noise). Before it there is no value network, but the push of a policy at its optimum is σ² ∇V, so that ∇V_k =
(∂ ref mean_k / ∂ h_k)ᵀ push_k / σ_k². Mirrored latents give A z for A = σ² ∇²V, and where λ is small

    cost_k ≈ ¼ Σ_i λ_i² = ¼ E (w·A z)(z·A w),      A z = σ (∇V(μ + σ z) − ∇V(μ − σ z)) / 2,      z, w independent:

what of a network's A is not symmetric, as second derivatives are, adds nothing on average. On the problems with a known
answer, for their best policy, the sum over the steps is within a tenth of what dynamic programming says.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ctrl_ray.diffusion.steps import StepKernel
from ctrl_ray.gradients.rollout import Trajectory, policy_step
from ctrl_ray.policy.protocol import Inputs, Policy

LogTilt = Callable[[Tensor], Tensor]
"""Clean latents (B, ...) to Σ_c γ_c / β log p_c, (B,) in nats."""


def variance_cost(
    policy: Policy, kernel: StepKernel, trajectory: Trajectory, log_tilt: LogTilt, noise: Tensor
) -> Tensor:
    """What fixed variances cost along each path of a policy near its optimum, (B,) float64 in nats, over the steps it takes.

    It is as good as the policy: one that pushes too hard bends its value too much. Memory: one graph of the reference's step.

    Args:
        noise: (M, B, ...) standard normal, for M pairs of mirrored next latents at the last step; M at least 8.
    """
    steps = [k for k in range(kernel.num_steps) if kernel.controlled(k) and kernel.std(k) > 0]
    inputs, latents = trajectory.inputs, trajectory.latents

    def mean_of(step_index: int) -> Tensor:
        return _mean(policy, kernel, step_index, latents[step_index], inputs)

    def gradient(step_index: int, points: Tensor) -> Tensor:
        return _value_gradient(policy, kernel, step_index, points, inputs)

    def end(points: Tensor) -> Tensor:
        return log_tilt(_clean(policy, kernel, steps[-1] + 1, points, inputs))

    costs = latents.new_zeros(latents.shape[1], dtype=torch.float64)
    for index, (step, following) in enumerate(zip(steps, steps[1:], strict=False)):
        mean, std = mean_of(step), kernel.std(step)
        probes = (latents[following] - mean) / std, noise[index % len(noise)]
        bent = [std / 2 * (gradient(following, mean + std * z) - gradient(following, mean - std * z)) for z in probes]
        costs += _dot(probes[1], bent[0]) * _dot(probes[0], bent[1]) / 4
    return costs + _last_cost(end, mean_of(steps[-1]), kernel.std(steps[-1]) * noise)


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first.double() * second.double()).flatten(1).sum(1)


@torch.no_grad()
def _mean(policy: Policy, kernel: StepKernel, step_index: int, latents: Tensor, inputs: Inputs) -> Tensor:
    return policy_step(policy, kernel, step_index, latents, inputs, reference=False).mean


def _value_gradient(policy: Policy, kernel: StepKernel, step_index: int, latents: Tensor, inputs: Inputs) -> Tensor:
    """∇V before a step of the policy's."""
    mean = _mean(policy, kernel, step_index, latents, inputs)
    with torch.enable_grad():
        leaf = latents.detach().requires_grad_(True)
        ref_mean = policy_step(policy, kernel, step_index, leaf, inputs, reference=True).mean
        push = (mean - ref_mean.detach()) / kernel.std(step_index) ** 2
        (gradient,) = torch.autograd.grad(ref_mean, leaf, push)
    return gradient


@torch.no_grad()
def _clean(policy: Policy, kernel: StepKernel, step_index: int, latents: Tensor, inputs: Inputs) -> Tensor:
    """Clean latents of the reference's means from a step on."""
    for following in range(step_index, kernel.num_steps):
        latents = policy_step(policy, kernel, following, latents, inputs, reference=True).mean
    return latents


def _last_cost(value: LogTilt, mean: Tensor, noise: Tensor) -> Tensor:
    pairs = torch.stack([value(mean + part).double() + value(mean - part).double() for part in noise])
    residuals = pairs / 2 - value(mean).double()
    return residuals.logsumexp(0) - math.log(len(noise)) - residuals.mean(0)
