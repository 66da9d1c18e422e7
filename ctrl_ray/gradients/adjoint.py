"""The adjoint sweep: back-propagation through a trajectory, one step's graph at a time.

For k = T−1 … 0, with h_k a fresh leaf and λ_{k+1} the cotangent of h_{k+1}:

    step_loss_k = ⟨next_latents_k, λ_{k+1}⟩ + kl_coef · KL_k
    parameter gradient += w_k ∂ step_loss_k / ∂ θ,      λ_k = ∂ step_loss_k / ∂ h_k

which is reverse-mode differentiation of  −Σ weights · log p(y|h_T) + kl_coef Σ_k KL_k  through
h_{k+1} = mean_k(h_k) + std_k z_k, step by step (the discrete adjoint): memory is flat in T and independent of the
reward model. KL_k depends on h_k through the policy and through the reference; both paths count.

The other estimators differ in what carries the cotangent (`AdjointPlan.pullback`): the reference's step alone, or nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ctrl_ray.diffusion.steps import GaussianStep, LatentReduction, StepKernel, gaussian_log_prob, step_kl
from ctrl_ray.errors import NonFiniteError
from ctrl_ray.gradients.estimators import AdjointPlan
from ctrl_ray.gradients.rollout import Trajectory, policy_step
from ctrl_ray.policy.protocol import Policy


class TerminalReward(NamedTuple):
    """The reward Σ_c γ_c log p_c of a micro-batch's clean latents."""

    value: Tensor | None
    """(B,); needed by the score function only."""
    cotangent: Tensor | None
    """Like the clean latents, float32, unreduced: its gradient (`RewardAnswer.cotangent`); None for a reward without."""


@dataclass(frozen=True)
class AdjointStats:
    """What a sweep saw."""

    kl_per_step: Tensor
    """(B, T) nats; NaN where the plan computed none."""


def adjoint_pass(
    policy: Policy,
    kernel: StepKernel,
    trajectory: Trajectory,
    reward: TerminalReward,
    plan: AdjointPlan,
    *,
    kl_coef: float,
    sample_weights: Tensor,
    backward: Callable[[Tensor], None],
    latent_reduction: LatentReduction = "sum",
    groups: Tensor | None = None,
) -> AdjointStats:
    """Accumulate the gradient of Σ_b sample_weights_b (−reward_b + kl_coef Σ_k KL_bk) into the policy's parameters.

    Args:
        trajectory: rolled out under this policy with its present parameters.
        reward: of the trajectory's clean latents. The sign of the cotangent is turned here, once
            (λ_T = −Σ_c γ_c ∇ log p_c, weighted).
        plan: from an estimator; weights multiply parameter gradients only.
        sample_weights: (B,); they sum to 1 over the global batch (times the number of ranks where the engine averages
            over ranks); 0 marks padding.
        backward: runs back-propagation of a scalar into parameters and leaves (`Tensor.backward`, or the engine's).
        groups: (B,) which samples share prompt and label, for the score function's baseline; None: no baseline.

    Raises NonFiniteError where the loss of a step or a cotangent is not finite.
    """
    sweep = _Sweep(policy, kernel, trajectory, plan, kl_coef, sample_weights, backward, latent_reduction)
    if plan.pullback == "score":
        assert reward.value is not None, "the score function needs the reward's value"
        return sweep.score(reward.value, groups)
    assert reward.cotangent is not None, "this estimator needs the reward's gradient"
    return sweep.through(reward.cotangent)


class _Sweep:
    """One micro-batch on its way back."""

    def __init__(
        self,
        policy: Policy,
        kernel: StepKernel,
        trajectory: Trajectory,
        plan: AdjointPlan,
        kl_coef: float,
        sample_weights: Tensor,
        backward: Callable[[Tensor], None],
        latent_reduction: LatentReduction,
    ) -> None:
        self.policy, self.kernel, self.trajectory, self.plan = policy, kernel, trajectory, plan
        self.kl_coef, self.backward, self.latent_reduction = kl_coef, backward, latent_reduction
        clean = trajectory.clean_latents
        self.weights = sample_weights.to(clean.dtype)
        self.kl_per_step = torch.full((len(clean), kernel.num_steps), float("nan"), device=clean.device)

    def through(self, reward_cotangent: Tensor) -> AdjointStats:
        """Carry the cotangent back through the policy's or the reference's steps."""
        one_step = self._policy_pullback if self.plan.pullback == "policy" else self._reference_pullback
        cotangent = -reward_cotangent * self.weights.view(-1, *[1] * (reward_cotangent.dim() - 1))
        for step_index in reversed(range(self.plan.stop_below, self.kernel.num_steps)):
            if self.kernel.controlled(step_index):
                cotangent = one_step(step_index, cotangent)
            else:  # the reference's own step: a fixed part of the reward, with no parameters
                self.kl_per_step[:, step_index] = 0.0
                cotangent, _ = self._through_reference(step_index, cotangent)
            _require_finite(cotangent, f"the cotangent at denoising step {step_index}")
        return AdjointStats(self.kl_per_step)

    def score(self, rewards: Tensor, groups: Tensor | None) -> AdjointStats:
        """Log-probabilities times what the later steps and the reward bring, plus the direct gradient of the KL."""
        returns = rewards.to(self.weights)
        for step_index in reversed(range(self.plan.stop_below, self.kernel.num_steps)):
            if not self.kernel.controlled(step_index):
                self.kl_per_step[:, step_index] = 0.0
                continue
            latents = self.trajectory.latents[step_index]
            step = self._step(step_index, latents, reference=False)
            with torch.no_grad():
                ref = self._step(step_index, latents, reference=True)
            log_prob = gaussian_log_prob(step, self.trajectory.latents[step_index + 1])
            kl = self._kl(step_index, step, ref)
            advantages = returns - _leave_one_out(returns, groups)
            loss = (self.weights * (self.kl_coef * kl - advantages * log_prob)).sum()
            _require_finite(loss, f"the loss of denoising step {step_index}")
            self.backward(loss * self.plan.weights[step_index])
            returns = returns - self.kl_coef * kl.detach()
        return AdjointStats(self.kl_per_step)

    def _policy_pullback(self, step_index: int, cotangent: Tensor) -> Tensor:
        """Step k's parameter gradient; the cotangent through policy and KL, free of the step's weight."""
        latents = self._leaf(step_index)
        step = self._step(step_index, latents, reference=False)
        kl = self._kl(step_index, step, self._step(step_index, latents, reference=True))
        loss = (step.mean * cotangent).sum() + self.kl_coef * (kl * self.weights).sum()
        _require_finite(loss, f"the loss of denoising step {step_index}")
        weight = self.plan.weights[step_index]
        if weight == 0:
            return torch.autograd.grad(loss, latents)[0]
        self.backward(loss * weight)
        assert latents.grad is not None
        return latents.grad / weight

    def _reference_pullback(self, step_index: int, cotangent: Tensor) -> Tensor:
        """Adjoint matching: regress the policy's mean on the adjoint, and carry that through the reference."""
        pulled_back, ref = self._through_reference(step_index, cotangent)
        if self.plan.weights[step_index]:
            step = self._step(step_index, self.trajectory.latents[step_index], reference=False)
            kl = self._kl(step_index, step, ref)
            loss = (step.mean * cotangent).sum() + self.kl_coef * (kl * self.weights).sum()
            _require_finite(loss, f"the loss of denoising step {step_index}")
            self.backward(loss * self.plan.weights[step_index])
        return pulled_back

    def _through_reference(self, step_index: int, cotangent: Tensor) -> tuple[Tensor, GaussianStep]:
        latents = self._leaf(step_index)
        with torch.enable_grad():
            ref = self._step(step_index, latents, reference=True)
            (pulled_back,) = torch.autograd.grad((ref.mean * cotangent).sum(), latents)
        return pulled_back, GaussianStep(ref.mean.detach(), ref.std.detach())

    def _leaf(self, step_index: int) -> Tensor:
        return self.trajectory.latents[step_index].detach().requires_grad_(True)

    def _step(self, step_index: int, latents: Tensor, *, reference: bool) -> GaussianStep:
        at = self.trajectory
        return policy_step(
            self.policy, self.kernel, step_index, latents, at.condition, at.labels, at.guidance, reference=reference
        )

    def _kl(self, step_index: int, step: GaussianStep, ref: GaussianStep) -> Tensor:
        kl = step_kl(step, ref, self.latent_reduction)
        self.kl_per_step[:, step_index] = kl.detach()
        return kl


def _leave_one_out(returns: Tensor, groups: Tensor | None) -> Tensor:
    """Mean return of the other samples of each one's group, (B,); 0 for a sample that is alone."""
    if groups is None:
        return torch.zeros_like(returns)
    _, group = torch.unique(groups, return_inverse=True)
    sums = torch.zeros_like(returns).index_add(0, group, returns)[group]
    counts = torch.zeros_like(returns).index_add(0, group, torch.ones_like(returns))[group]
    return (sums - returns) / (counts - 1).clamp_min(1.0)


def _require_finite(values: Tensor, what: str) -> None:
    if bool(torch.isfinite(values).all()):
        return
    got = f" is {float(values.detach())}; expected a finite number" if values.numel() == 1 else " is not finite"
    raise NonFiniteError(
        f"{what}{got}. Lower the learning rate or gradient_clipping, or look at the rewards of this micro-batch"
    )
