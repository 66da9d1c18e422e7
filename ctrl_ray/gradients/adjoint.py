"""The adjoint pass: back-propagation through a trajectory, one step's graph at a time.

For k = T−1 … 0, with h_k a fresh leaf and λ_{k+1} the cotangent of h_{k+1}:

    step_loss_k = ⟨next_latents_k, λ_{k+1}⟩ + kl_coef · KL_k
    parameter gradient += w_k ∂ step_loss_k / ∂ θ,      λ_k = ∂ step_loss_k / ∂ h_k

which is reverse-mode differentiation of  −Σ weights · log p(y|h_T) + kl_coef Σ_k KL_k  through
h_{k+1} = mean_k(h_k) + std_k z_k, step by step (the discrete adjoint): memory is flat in T and independent of the
reward model. KL_k depends on h_k through the policy and through the reference; both paths count. The rollout knows the
policy's mean already, so the reference's path goes back first, and its graph is gone before the policy's is made.

What is computed at one step, and what is carried from step to step, is the estimator's (`Estimator.pull_back`; the
estimators are in `ctrl_ray.gradients.estimators`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ctrl_ray.diffusion.steps import GaussianStep, LatentReduction, StepKernel, step_kl
from ctrl_ray.errors import NonFiniteError
from ctrl_ray.gradients.rollout import StepGraph, Trajectory, policy_step
from ctrl_ray.policy.protocol import Policy, policy_for_latents


@dataclass(frozen=True)
class AdjointPlan:
    """Which steps one micro-batch's adjoint pass visits, and with what weight."""

    weights: tuple[float, ...]
    """(T,): multiplies a step's parameter gradient, never the cotangent that is passed on; 0: the step has none."""
    stop_below: int = 0
    """The pass runs for step indices T − 1 … stop_below."""


class TerminalReward(NamedTuple):
    """The reward Σ_c γ_c log p_c of a micro-batch's clean latents."""

    value: Tensor | None
    """(B,); needed by the score function only."""
    cotangent: Tensor | None
    """Like the clean latents, float32, unreduced: its gradient (`RewardAnswer.cotangent`); None for a reward without."""


@dataclass(frozen=True)
class AdjointStats:
    """What an adjoint pass saw."""

    kl_per_step: Tensor
    """(B, T) nats; NaN where the plan computed none."""
    bounded: Tensor
    """(B,): share of the controlled steps whose cotangent was bounded."""


class _Checked(NamedTuple):
    """What must be finite."""

    what: str
    finite: Tensor
    """() bool, where it was computed."""
    value: Tensor | None
    """Of a single number."""


class MicroBatch:
    """One micro-batch in its adjoint pass: what an estimator asks for at a step."""

    def __init__(
        self,
        policy: Policy,
        kernel: StepKernel,
        trajectory: Trajectory,
        *,
        kl_coef: float,
        sample_weights: Tensor,
        backward: Callable[[Tensor], None],
        latent_reduction: LatentReduction = "sum",
        groups: Tensor | None = None,
        max_drift: float = math.inf,
    ) -> None:
        """See `adjoint_pass` for what they are."""
        clean = trajectory.clean_latents
        self.kernel, self.trajectory, self.groups = kernel, trajectory, groups
        self.kl_coef, self.backward = kl_coef, backward
        self.weights = sample_weights.to(clean.dtype)
        self.kl_per_step = torch.full((len(clean), kernel.num_steps), float("nan"), device=clean.device)
        self.num_bounded = torch.zeros(len(clean), device=clean.device)
        self._policy, self._latent_reduction, self._max_drift = policy, latent_reduction, max_drift
        self._checked: list[_Checked] = []

    def leaf(self, step_index: int) -> Tensor:
        """h_k as a leaf that takes a gradient."""
        return self.trajectory.latents[step_index].detach().requires_grad_(True)

    def step(self, step_index: int, latents: Tensor, *, reference: bool) -> GaussianStep:
        """Law of the next latents under the policy or the reference."""
        return policy_step(self._policy, self.kernel, step_index, latents, self.trajectory.inputs, reference=reference)

    def graph(self, step_index: int) -> StepGraph:
        """Policy and reference at h_k: the graph that the rollout kept, or a new one."""
        kept = self.trajectory.graphs.get(step_index)
        if kept is not None:
            return kept
        latents = self.leaf(step_index)
        step, ref = (self.step(step_index, latents, reference=reference) for reference in (False, True))
        return StepGraph(latents, step, ref)

    def through_kl(self, step_index: int, policy_mean: Tensor) -> tuple[Tensor, Tensor]:
        """Of kl_coef Σ_b weights_b KL_kb: its gradient by the latents through the reference's step alone, and by the policy's
        mean, which the rollout knows. No parameter gets a gradient. Both have the kernel's std, which nothing trains."""
        latents = self.leaf(step_index)
        with torch.enable_grad():
            ref = self.step(step_index, latents, reference=True)
            means = [mean.detach().requires_grad_(True) for mean in (policy_mean, ref.mean)]
            kl = self.kl(step_index, *(GaussianStep(mean, ref.std.detach()) for mean in means))
            by_policy, by_ref = torch.autograd.grad(self.kl_coef * (kl * self.weights).sum(), means)
            (pulled_back,) = torch.autograd.grad((ref.mean * by_ref).sum(), latents)
        return pulled_back, by_policy

    def kl(self, step_index: int, step: GaussianStep, ref: GaussianStep) -> Tensor:
        """KL_k, (B,) in nats; it is also noted for the statistics. **The KL of training is computed here.**"""
        kl = step_kl(step, ref, self._latent_reduction)
        self.kl_per_step[:, step_index] = kl.detach()
        return kl

    def bounded(self, step_index: int, cotangent: Tensor) -> Tensor:
        """The cotangent λ of a controlled step's outcome, each sample's no longer than one that asks for a drift of
        `max_drift`: the drift where λ and the KL balance is −std λ / kl_coef, in standard deviations."""
        if math.isinf(self._max_drift):
            return cotangent
        share = 1 if self._latent_reduction == "sum" else cotangent[0].numel()
        longest = self.weights * (self._max_drift * self.kl_coef / share / self.kernel.std(step_index))
        length = cotangent.flatten(1).norm(dim=1)
        self.num_bounded += length > longest
        factor = (longest / length.clamp_min(torch.finfo(length.dtype).tiny)).clamp_max(1)
        return cotangent * factor.view(-1, *[1] * (cotangent.dim() - 1))

    def through_reference(self, step_index: int, cotangent: Tensor) -> tuple[Tensor, GaussianStep]:
        """The cotangent carried back through the reference's step alone, and that step (without graph)."""
        latents = self.leaf(step_index)
        with torch.enable_grad():
            ref = self.step(step_index, latents, reference=True)
            (pulled_back,) = torch.autograd.grad((ref.mean * cotangent).sum(), latents)
        return pulled_back, GaussianStep(ref.mean.detach(), ref.std.detach())

    def through_both(self, step_index: int, cotangent: Tensor) -> tuple[Tensor, GaussianStep]:
        """The cotangent carried back through the policy's step and through the log-ratio of both at the latents that were
        drawn (times kl_coef and the weights), and the reference's step (without graph). No parameter gets a gradient."""
        latents = self.leaf(step_index)
        policy = policy_for_latents(self._policy)
        share = 1 if self._latent_reduction == "sum" else latents[0].numel()
        factors = self.kl_coef / share * self.weights.view(-1, *[1] * (latents.dim() - 1))
        with torch.enable_grad():
            step, ref = (
                policy_step(policy, self.kernel, step_index, latents, self.trajectory.inputs, reference=reference)
                for reference in (False, True)
            )
            score = (self.trajectory.latents[step_index + 1] - ref.mean.detach()) / ref.std**2
            carried = (step.mean * cotangent + (step.mean - ref.mean) * factors * score).sum()
            (pulled_back,) = torch.autograd.grad(carried, latents)
        return pulled_back, GaussianStep(ref.mean.detach(), ref.std.detach())

    def require_finite(self, values: Tensor, what: str) -> None:
        """Note whether they are finite, for `check`: to look at every step would wait for a GPU each time."""
        values = values.detach()
        self._checked.append(_Checked(what, torch.isfinite(values).all(), values if values.numel() == 1 else None))

    def check(self) -> None:
        """NonFiniteError that names the first of what was to be finite and is not, with its value where it is a single one."""
        if not self._checked or bool(torch.stack([each.finite for each in self._checked]).all()):
            return
        what, _, value = next(each for each in self._checked if not bool(each.finite))
        got = " is not finite" if value is None else f" is {float(value)}; expected a finite number"
        raise NonFiniteError(
            f"{what}{got}. Lower the learning rate or gradient_clipping, or look at the rewards of this micro-batch"
        )


class Calls(NamedTuple):
    """Denoiser calls."""

    forwards: float
    backwards: float
    parameter_backwards: float
    """Of the backwards' steps, those that make parameter gradients (one reduction each under ZeRO 2 and 3)."""


class Estimator(ABC):
    """A way to estimate the gradient of CTRL's objective."""

    name: ClassVar[str]
    needs_cotangent: ClassVar[bool] = True
    """Whether the reward must have a gradient."""

    keep_graphs: bool = False
    """Whether the rollout keeps every step's graph for the adjoint pass."""

    @property
    def keep_means(self) -> bool:
        """Whether the rollout keeps every step's mean for the adjoint pass."""
        return False

    @abstractmethod
    def plan(self, num_steps: int, seed: int, update: int, micro_batch: int) -> AdjointPlan:
        """The steps of one micro-batch: the same on every rank."""

    @abstractmethod
    def start(self, batch: MicroBatch, reward: TerminalReward) -> Tensor:
        """What is carried into the last step: the weighted cotangent λ_T, or the return."""

    @abstractmethod
    def pull_back(self, batch: MicroBatch, step_index: int, carried: Tensor, weight: float) -> Tensor:
        """Accumulate `weight` times step k's parameter gradient (none where it is 0); returns what is carried to k − 1,
        which the weight must not touch."""

    @abstractmethod
    def pass_reference(self, batch: MicroBatch, step_index: int, carried: Tensor) -> Tensor:
        """Carry on through a step that the reference takes in the policy's place."""

    @abstractmethod
    def step_calls(self, *, controlled: bool, weighted: bool) -> Calls:
        """Denoiser calls of one step of the adjoint pass: of `pull_back`, or (not controlled) of `pass_reference`."""

    def calls(self, plan: AdjointPlan, kernel: StepKernel) -> Calls:
        """Denoiser calls of a micro-batch under `plan`: its rollout, and every step of its adjoint pass."""
        steps = [
            self.step_calls(controlled=kernel.controlled(k), weighted=plan.weights[k] != 0)
            for k in range(plan.stop_below, kernel.num_steps)
        ]
        return Calls(
            kernel.num_steps + sum(step.forwards for step in steps),
            sum(step.backwards for step in steps),
            sum(step.parameter_backwards for step in steps),
        )


def adjoint_pass(
    policy: Policy,
    kernel: StepKernel,
    trajectory: Trajectory,
    reward: TerminalReward,
    estimator: Estimator,
    plan: AdjointPlan,
    *,
    kl_coef: float,
    sample_weights: Tensor,
    backward: Callable[[Tensor], None],
    latent_reduction: LatentReduction = "sum",
    groups: Tensor | None = None,
    max_drift: float = math.inf,
) -> AdjointStats:
    """Accumulate the gradient of Σ_b sample_weights_b (−reward_b + kl_coef Σ_k KL_bk) into the policy's parameters.

        estimator = Full()
        plan = estimator.plan(kernel.num_steps, seed, update, micro_batch)
        adjoint_pass(policy, kernel, trajectory, reward, estimator, plan, kl_coef=1.0, sample_weights=w, backward=...)

    Args:
        trajectory: rolled out under this policy with its present parameters.
        reward: of the trajectory's clean latents. The sign of the cotangent is turned by the estimator, once
            (λ_T = −Σ_c γ_c ∇ log p_c, weighted).
        plan: from the estimator; weights multiply parameter gradients only.
        sample_weights: (B,); they sum to 1 over the global batch (times the number of ranks where the engine averages
            over ranks); 0 marks padding.
        backward: runs back-propagation of a scalar into parameters and leaves (`Tensor.backward`, or the engine's).
        groups: (B,) which samples share prompt and label, for the score function's baseline; None: no baseline.
        max_drift: longest drift, in standard deviations of a step's noise, that a sample's cotangent may ask of a step; a
            longer cotangent is shortened before the step is gone back through. Biased where it binds.

    Raises NonFiniteError where the loss of a step, or what is carried to the next, is not finite: after the last step, for
    all of them at once.
    """
    batch = MicroBatch(
        policy,
        kernel,
        trajectory,
        kl_coef=kl_coef,
        sample_weights=sample_weights,
        backward=backward,
        latent_reduction=latent_reduction,
        groups=groups,
        max_drift=max_drift,
    )
    controlled = [k for k in range(plan.stop_below, kernel.num_steps) if kernel.controlled(k)]
    carried = estimator.start(batch, reward)
    for step_index in reversed(range(plan.stop_below, kernel.num_steps)):
        if step_index in controlled:
            if estimator.needs_cotangent:
                carried = batch.bounded(step_index, carried)
            carried = estimator.pull_back(batch, step_index, carried, plan.weights[step_index])
        else:  # the reference's own step: a fixed part of the reward, with no parameters
            batch.kl_per_step[:, step_index] = 0.0
            carried = estimator.pass_reference(batch, step_index, carried)
        batch.require_finite(carried, f"the cotangent at denoising step {step_index}")
    batch.check()
    return AdjointStats(batch.kl_per_step, batch.num_bounded / max(1, len(controlled)))
