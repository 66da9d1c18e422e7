"""The exact gradient of a trajectory, as most tests ask for it."""

from __future__ import annotations

from torch import Tensor

from ctrl_ray.diffusion.steps import StepKernel
from ctrl_ray.gradients.adjoint import TerminalReward, adjoint_pass
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
) -> None:
    """Accumulate the gradient of Σ_b weights_b (−reward_b + kl_coef KL_b) by the whole adjoint pass; `cotangent` is the
    reward's gradient at the clean latents."""
    adjoint_pass(
        policy,
        kernel,
        trajectory,
        TerminalReward(None, cotangent),
        Full(),
        Full().plan(kernel.num_steps, 0, 0, 0),
        kl_coef=kl_coef,
        sample_weights=weights,
        backward=Tensor.backward,
    )
