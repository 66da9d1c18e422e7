"""The exact gradient of a trajectory, as most tests ask for it."""

from __future__ import annotations

import math

from torch import Tensor

from ctrl_ray.diffusion.steps import StepKernel
from ctrl_ray.gradients.adjoint import AdjointStats, TerminalReward, adjoint_pass
from ctrl_ray.gradients.estimators import Full
from ctrl_ray.gradients.rollout import Trajectory
from ctrl_ray.policy.protocol import Policy


def full_pass(
    policy: Policy,
    kernel: StepKernel,
    trajectory: Trajectory,
    cotangent: Tensor,
    weights: Tensor,
    *,
    kl_coef: float = 1.0,
    max_drift: float = math.inf,
) -> AdjointStats:
    """Accumulate the gradient of Σ_b weights_b (−reward_b + kl_coef KL_b) by the whole adjoint pass; `cotangent` is the
    reward's gradient at the clean latents."""
    return adjoint_pass(
        policy,
        kernel,
        trajectory,
        TerminalReward(None, cotangent),
        Full(),
        Full().plan(kernel.num_steps, 0, 0, 0),
        kl_coef=kl_coef,
        max_drift=max_drift,
        sample_weights=weights,
        backward=Tensor.backward,
    )
