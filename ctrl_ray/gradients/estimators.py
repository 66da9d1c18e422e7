"""Gradient estimators: which steps of a trajectory are visited, with what weight, and what carries the cotangent back.

Each is a small class that owns its plan, its pullback and its cost. What it costs counts calls of the denoiser, each with
a whole micro-batch and all its guidance branches (two with classifier-free guidance), rollout included.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrl_ray.config import EstimatorConfig
from ctrl_ray.diffusion.noise import draw_uniform
from ctrl_ray.diffusion.steps import GaussianStep, gaussian_log_prob
from ctrl_ray.errors import ConfigError
from ctrl_ray.gradients.adjoint import AdjointPlan, Calls, Estimator, MicroBatch, TerminalReward


class _ByCotangent(Estimator):
    """Estimators that carry the cotangent λ of the latents."""

    def start(self, batch: MicroBatch, reward: TerminalReward) -> Tensor:
        """λ_T = −Σ_c γ_c ∇ log p_c, times each sample's weight."""
        assert reward.cotangent is not None, f"{self.name} needs the reward's gradient"
        return -reward.cotangent * batch.weights.view(-1, *[1] * (reward.cotangent.dim() - 1))

    def pass_reference(self, batch: MicroBatch, step_index: int, carried: Tensor) -> Tensor:
        """Through the reference's step."""
        return batch.through_reference(step_index, carried)[0]

    def _loss(self, batch: MicroBatch, step_index: int, mean: Tensor, carried: Tensor, kl: Tensor) -> Tensor:
        loss = (mean * carried).sum() + batch.kl_coef * (kl * batch.weights).sum()
        batch.require_finite(loss, f"the loss of denoising step {step_index}")
        return loss


class _ThroughPolicy(_ByCotangent):
    """The cotangent goes back through the policy's own step, and through the KL's two means."""

    @property
    def keep_means(self) -> bool:
        """Where the graphs are not kept, which have them."""
        return not self.keep_graphs

    def pull_back(self, batch: MicroBatch, step_index: int, carried: Tensor, weight: float) -> Tensor:
        """One graph at a time where the rollout kept the policy's means: the KL's gradient by the reference's mean is known
        before the policy's graph is made, and goes back first. Else one backward through both."""
        if batch.trajectory.means is None:
            latents, step, ref = batch.graph(step_index)
            loss = self._loss(batch, step_index, step.mean, carried, batch.kl(step_index, step, ref))
            return self._by_loss(batch, latents, loss, weight)
        through_ref, by_policy = batch.through_kl(step_index, batch.trajectory.means[step_index])
        latents = batch.leaf(step_index)
        step = batch.step(step_index, latents, reference=False)
        loss = (step.mean * (carried + by_policy)).sum()
        batch.require_finite(loss, f"the loss of denoising step {step_index}")
        return self._by_loss(batch, latents, loss, weight) + through_ref

    def _by_loss(self, batch: MicroBatch, latents: Tensor, loss: Tensor, weight: float) -> Tensor:
        """One backward gives both: `weight` times the parameter gradient, and the gradient of the latents."""
        if weight == 0:
            return torch.autograd.grad(loss, latents)[0]
        batch.backward(loss * weight)
        assert latents.grad is not None
        return latents.grad / weight

    def step_calls(self, *, controlled: bool, weighted: bool) -> Calls:
        """Policy and reference, forward and backward."""
        return Calls(2, 2, float(weighted)) if controlled else Calls(1, 1, 0)


class _AtFixedLatents(_ByCotangent):
    """The parameters' gradient has a graph of its own, of the policy's step alone, whose latents are fixed."""

    @abstractmethod
    def carry(self, batch: MicroBatch, step_index: int, carried: Tensor) -> tuple[Tensor, GaussianStep]:
        """The cotangent at step k, without a gradient of any parameter, and the reference's step."""

    def pull_back(self, batch: MicroBatch, step_index: int, carried: Tensor, weight: float) -> Tensor:
        """What `carry` says; where the step has a weight, the policy's mean is regressed on the cotangent."""
        pulled_back, ref = self.carry(batch, step_index, carried)
        if weight:
            step = batch.step(step_index, batch.trajectory.latents[step_index], reference=False)
            kl = batch.kl(step_index, step, ref)
            batch.backward(self._loss(batch, step_index, step.mean, carried, kl) * weight)
        return pulled_back


@dataclass(frozen=True)
class Full(_ThroughPolicy):
    """The exact gradient of the discretised objective: every step is visited with weight 1.

    Unbiased: autograd through the whole graph, to rounding. Cost: 3 T forwards (rollout; policy and reference in the
    adjoint pass), 2 T backwards; one each less for a step that is the reference's. With keep_graphs 2 T forwards, and all
    steps' graphs in memory at once.
    """

    keep_graphs: bool = False
    name: ClassVar[str] = "full"

    def step_calls(self, *, controlled: bool, weighted: bool) -> Calls:
        """With the graphs of the rollout: the reference's forward beside the policy's, and both backwards."""
        if self.keep_graphs and controlled:
            return Calls(1, 2, float(weighted))
        return super().step_calls(controlled=controlled, weighted=weighted)

    def plan(self, num_steps: int, seed: int, update: int, micro_batch: int) -> AdjointPlan:
        """All steps."""
        return AdjointPlan((1.0,) * num_steps)


class StickingTheLanding(_AtFixedLatents):
    """The exact gradient of E log w, w the weight of a path (`ctrl_ray.evaluation.certificate`), without the part of it whose
    mean is zero: the policy's density counts as a function of the latents alone (Roeder et al. 2017).

    With z_k the noise of a step, u_k = (mean_k − ref_mean_k) / std_k and y_k = (z_k + u_k) / std_k, the cotangent is

        λ_k = J_policyᵀ (λ_{k+1} + β w y_k) − J_refᵀ β w y_k,      β = kl_coef, w the sample's weight,

    where `full` has u_k / std_k in the place of y_k; the parameters' loss is that of `full`. What is added, (J_policy −
    J_ref)ᵀ β w z_k / std_k, has mean zero given h_k, so this is unbiased as `full` is. At a policy whose log w is the same for
    every path each sample's gradient is zero, not only their mean. Measured at the best policy of fixed variances, 50 steps:
    the gradient's standard deviation is 0.29 of that of `full` on T1 and 0.78 on T4 (`ctrl_ray.exact.suite`); at the start of
    training they are equal. Cost: 4 T forwards, 3 T backwards: the policy once for the latents, once for its parameters.
    """

    name = "sticking_the_landing"

    def plan(self, num_steps: int, seed: int, update: int, micro_batch: int) -> AdjointPlan:
        """All steps."""
        return AdjointPlan((1.0,) * num_steps)

    def carry(self, batch: MicroBatch, step_index: int, carried: Tensor) -> tuple[Tensor, GaussianStep]:
        """Through both steps."""
        return batch.through_both(step_index, carried)

    def step_calls(self, *, controlled: bool, weighted: bool) -> Calls:
        """Policy and reference for the latents; the policy for its parameters."""
        trained = float(weighted)
        return Calls(2 + trained, 2 + trained, trained) if controlled else Calls(1, 1, 0)


@dataclass(frozen=True)
class LastK(_ThroughPolicy):
    """Only the last `steps` steps are visited (DRaFT-K, Clark et al. 2024); those before get no gradient.

    Biased: unbiased for the derivative by the last steps' use of the parameters only, so it reaches too small a
    reward. Cost with K = steps: T + 2 K forwards, 2 K backwards.
    """

    steps: int
    name: ClassVar[str] = "last_k"

    def plan(self, num_steps: int, seed: int, update: int, micro_batch: int) -> AdjointPlan:
        """The last steps; ConfigError where the sampler has fewer."""
        if not 1 <= self.steps <= num_steps:
            raise ConfigError(
                f"last_k visits {self.steps} steps; expected 1 to {num_steps}, the sampler's number of steps"
            )
        first = num_steps - self.steps
        return AdjointPlan((0.0,) * first + (1.0,) * self.steps, first)


@dataclass(frozen=True)
class RandomSuffix(_ThroughPolicy):
    """One draw of K per micro-batch: steps k ≥ K are visited, step k's parameter gradient weighted by 1 / P(K ≤ k).

    K = 0 with `full_probability`, else uniform over 1 … T − 1. Unbiased before gradient clipping: λ_{k+1} depends on
    steps above k only, all of them kept, so E Σ 1{K ≤ k} g_k / P(K ≤ k) = Σ g_k. The weights inflate the gradient's
    norm. Cost: T + 2 S forwards, 2 S backwards, with S = T − (1 − full_probability) T / 2 visited steps on average.
    """

    full_probability: float = 0.3
    name: ClassVar[str] = "random_suffix"

    def plan(self, num_steps: int, seed: int, update: int, micro_batch: int) -> AdjointPlan:
        """The steps from K on."""
        share, draw = self.full_probability, draw_uniform(seed, update, micro_batch, "random_suffix")
        first = 0
        if draw >= share and num_steps > 1:
            first = 1 + int((draw - share) / (1 - share) * (num_steps - 1))
        below = [k / (num_steps - 1) if num_steps > 1 else 1.0 for k in range(num_steps)]  # P(K ≤ k | not the whole)
        weights = (1.0 / (share + (1 - share) * below[k]) if k >= first else 0.0 for k in range(num_steps))
        return AdjointPlan(tuple(weights), first)


@dataclass(frozen=True)
class AdjointMatching(_AtFixedLatents):
    """The policy is regressed on the lean adjoint, which the *reference* alone carries back (Domingo-Enrich et al. 2025).

    Per matched step, with h_k detached: ⟨mean_k, a_{k+1}⟩ + kl_coef KL_k. matched_steps of the T steps are chosen, one
    in each of as many equal strata, weighted by 1 / P(chosen); 0 matches all.
    Not the gradient of the objective away from the optimum; its fixed point is the fixed-variance optimum, which it
    reaches with less variance, because nothing goes back through the trained network. Unbiased over the choice of
    steps. Cost with M matched steps: 2 T + M forwards (rollout; reference; policy), T + M backwards.
    """

    matched_steps: int = 0
    name: ClassVar[str] = "adjoint_matching"

    def plan(self, num_steps: int, seed: int, update: int, micro_batch: int) -> AdjointPlan:
        """All steps, with weight at the matched ones."""
        count = min(self.matched_steps or num_steps, num_steps)
        borders = [round(stratum * num_steps / count) for stratum in range(count + 1)]
        weights = [0.0] * num_steps
        for stratum, (low, high) in enumerate(zip(borders, borders[1:], strict=False)):
            draw = draw_uniform(seed, update, micro_batch, f"adjoint_matching {stratum}")
            weights[low + int(draw * (high - low))] = float(high - low)
        return AdjointPlan(tuple(weights))

    def carry(self, batch: MicroBatch, step_index: int, carried: Tensor) -> tuple[Tensor, GaussianStep]:
        """Through the reference."""
        return batch.through_reference(step_index, carried)

    def step_calls(self, *, controlled: bool, weighted: bool) -> Calls:
        """The reference's step; the policy's where matched."""
        matched = float(controlled and weighted)
        return Calls(1 + matched, 1 + matched, matched)


class Reinforce(Estimator):
    """Score-function gradient with returns-to-go, and the direct gradient of each step's KL; the reward needs none.

    Step k's return is Σ_c γ_c log p_c − kl_coef Σ_{j>k} KL_j, less the mean return of the other samples of its group
    (same prompt and label: `group_size`). Unbiased; its variance is the largest of all, so take large batches. Not
    divided by the standard deviation of the returns, which would move the optimum. Cost: 3 T forwards, T backwards.
    """

    name = "reinforce"
    needs_cotangent = False

    def plan(self, num_steps: int, seed: int, update: int, micro_batch: int) -> AdjointPlan:
        """All steps."""
        return AdjointPlan((1.0,) * num_steps)

    def start(self, batch: MicroBatch, reward: TerminalReward) -> Tensor:
        """The reward, (B,)."""
        assert reward.value is not None, "the score function needs the reward's value"
        return reward.value.to(batch.weights)

    def pull_back(self, batch: MicroBatch, step_index: int, carried: Tensor, weight: float) -> Tensor:
        """Log-probability times the return's advantage, plus the KL; the KL is taken from the return."""
        latents = batch.trajectory.latents[step_index]
        step = batch.step(step_index, latents, reference=False)
        with torch.no_grad():
            ref = batch.step(step_index, latents, reference=True)
        log_prob = gaussian_log_prob(step, batch.trajectory.latents[step_index + 1])
        kl = batch.kl(step_index, step, ref)
        advantages = carried - _leave_one_out(carried, batch.groups)
        loss = (batch.weights * (batch.kl_coef * kl - advantages * log_prob)).sum()
        batch.require_finite(loss, f"the loss of denoising step {step_index}")
        batch.backward(loss * weight)
        return carried - batch.kl_coef * kl.detach()

    def pass_reference(self, batch: MicroBatch, step_index: int, carried: Tensor) -> Tensor:
        """The return stays: the step has no parameters and no KL."""
        return carried

    def step_calls(self, *, controlled: bool, weighted: bool) -> Calls:
        """Both forwards, one backward; nothing where the reference takes the step."""
        return Calls(2, 1, float(weighted)) if controlled else Calls(0, 0, 0)


def make_estimator(config: EstimatorConfig, num_steps: int) -> Estimator:
    """The estimator that a configuration names, for a sampler of `num_steps` steps."""
    if config.name in ("last_k", "adjoint_matching") and config.steps > num_steps:
        raise ConfigError(
            f"estimator.steps is {config.steps}, but the sampler has {num_steps} steps (sampler.num_steps); lower it"
        )
    makers: dict[str, Callable[[], Estimator]] = {
        Full.name: lambda: Full(config.fixed_keep_graphs),
        StickingTheLanding.name: StickingTheLanding,
        LastK.name: lambda: LastK(config.steps or 1),
        RandomSuffix.name: lambda: RandomSuffix(config.full_probability),
        AdjointMatching.name: lambda: AdjointMatching(config.steps),
        Reinforce.name: Reinforce,
    }
    return makers[config.name]()


def _leave_one_out(returns: Tensor, groups: Tensor | None) -> Tensor:
    """Mean return of the other samples of each one's group, (B,); 0 for a sample that is alone."""
    if groups is None:
        return torch.zeros_like(returns)
    _, group = torch.unique(groups, return_inverse=True)
    sums = torch.zeros_like(returns).index_add(0, group, returns)[group]
    counts = torch.zeros_like(returns).index_add(0, group, torch.ones_like(returns))[group]
    return (sums - returns) / (counts - 1).clamp_min(1.0)
