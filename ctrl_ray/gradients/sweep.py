"""The adjoint sweep: back-propagation through a trajectory, one step's graph at a time.

For k = T−1 … 0, with h_k a fresh leaf and λ_{k+1} the cotangent of h_{k+1}:

    step_loss_k = ⟨next_latents_k, λ_{k+1}⟩ + kl_coef · KL_k
    parameter gradient += w_k ∂ step_loss_k / ∂ θ,      λ_k = ∂ step_loss_k / ∂ h_k

which is reverse-mode differentiation of  −Σ weights · log p(y|h_T) + kl_coef Σ_k KL_k  through
h_{k+1} = mean_k(h_k) + std_k z_k, step by step (the discrete adjoint): memory is flat in T and independent of the
reward model. KL_k depends on h_k through the policy and through the reference; both paths count.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl_ray.diffusion.steps import LatentReduction, StepKernel, step_kl
from ctrl_ray.errors import NonFiniteError
from ctrl_ray.gradients.estimators import SweepPlan
from ctrl_ray.gradients.rollout import Trajectory, policy_step
from ctrl_ray.policy.condition import Policy


@dataclass(frozen=True)
class SweepStats:
    """What a sweep saw."""

    kl_per_step: Tensor
    """(B, T) nats; NaN below stop_below, where it was not computed."""
    cotangent_norms: Tensor
    """(T + 1,): L2 norm of λ_0 … λ_T over the micro-batch; NaN below stop_below."""


def adjoint_sweep(
    policy: Policy,
    kernel: StepKernel,
    trajectory: Trajectory,
    reward_cotangent: Tensor,
    plan: SweepPlan,
    *,
    kl_coef: float,
    sample_weights: Tensor,
    backward: Callable[[Tensor], None],
    latent_reduction: LatentReduction = "sum",
) -> SweepStats:
    """Accumulate the gradient of Σ_b sample_weights_b (−reward_b + kl_coef Σ_k KL_bk) into the policy's parameters.

    Args:
        trajectory: rolled out under this policy with its present parameters.
        reward_cotangent: like the clean latents, float32, unreduced: the *gradient of the reward* Σ_c γ_c log p_c at
            h_T (`Rewarded.cotangent`); its sign is turned here, once (λ_T = −Σ_c γ_c ∇ log p_c, weighted).
        plan: from an estimator; weights multiply parameter gradients only.
        sample_weights: (B,); they sum to 1 over the global batch (times the number of ranks where the engine averages
            over ranks); 0 marks padding.
        backward: runs back-propagation of a scalar into parameters and leaves (`Tensor.backward`, or the engine's).

    Raises NonFiniteError where the loss of a step or a cotangent is not finite.
    """
    assert plan.pullback == "policy", plan
    weights = sample_weights.to(reward_cotangent.dtype)
    per_sample = weights.view(-1, *[1] * (reward_cotangent.dim() - 1))
    cotangent = -reward_cotangent * per_sample
    num_steps = kernel.num_steps
    kl_per_step = torch.full((len(weights), num_steps), float("nan"), device=weights.device)
    norms = torch.full((num_steps + 1,), float("nan"))
    norms[num_steps] = cotangent.norm()
    for step_index in reversed(range(plan.stop_below, num_steps)):
        latents = trajectory.latents[step_index].detach().requires_grad_(True)
        at = (policy, kernel, step_index, latents, trajectory.condition, trajectory.labels, trajectory.guidance)
        if kernel.controlled(step_index):
            step = policy_step(*at, reference=False)
            ref = policy_step(*at, reference=True)
            kl = step_kl(step, ref, latent_reduction)
            kl_per_step[:, step_index] = kl.detach()
            step_loss = (step.mean * cotangent).sum() + kl_coef * (kl * weights).sum()
            cotangent = _pull_back(step_loss, latents, plan.weights[step_index], backward, step_index)
        else:  # the reference's own step: a fixed part of the reward, with no parameters
            kl_per_step[:, step_index] = 0.0
            surrogate = (policy_step(*at, reference=True).mean * cotangent).sum()
            (cotangent,) = torch.autograd.grad(surrogate, latents)
        norms[step_index] = cotangent.norm()
    return SweepStats(kl_per_step, norms)


def _pull_back(
    step_loss: Tensor, latents: Tensor, weight: float, backward: Callable[[Tensor], None], step_index: int
) -> Tensor:
    """Accumulate weight × the parameter gradient; return the unweighted gradient at the latents."""
    if not bool(torch.isfinite(step_loss)):
        raise NonFiniteError(
            f"the loss of denoising step {step_index} is {float(step_loss.detach())}; expected a finite number. Lower the "
            "learning rate or gradient_clipping, or look at the rewards of this micro-batch"
        )
    if weight == 0:
        (gradient,) = torch.autograd.grad(step_loss, latents)
        return gradient
    backward(step_loss * weight)
    assert latents.grad is not None
    gradient = latents.grad / weight
    if not bool(torch.isfinite(gradient).all()):
        raise NonFiniteError(
            f"the cotangent at denoising step {step_index} is not finite. Lower the learning rate, or look at the "
            "rewards of this micro-batch"
        )
    return gradient
