"""Gradient estimators: which steps of a trajectory are swept, with what weight, and what carries the cotangent back.

Each function here returns an `Estimator`. What it costs counts calls of the denoiser per sample and update, rollout
included: T steps, all of them under the policy's control; twice as many with classifier-free guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ctrl_ray.config import EstimatorConfig
from ctrl_ray.diffusion.noise import draw_uniform
from ctrl_ray.errors import ConfigError

Pullback = Literal["policy", "reference", "score"]


@dataclass(frozen=True)
class AdjointPlan:
    """One micro-batch's sweep."""

    weights: tuple[float, ...]
    """(T,): multiplies a step's parameter gradient, never the cotangent that is passed on; 0: the step has none."""
    stop_below: int
    """The sweep runs for step indices T − 1 … stop_below."""
    pullback: Pullback
    """What carries the reward's gradient from step to step: the policy's own step; the reference's step (adjoint
    matching); nothing, where the score function replaces it."""


@dataclass(frozen=True)
class Estimator:
    """A way to estimate the gradient of CTRL's objective."""

    name: str
    needs_cotangent: bool
    """Whether the reward must have a gradient."""
    plan: Callable[[int, int, int, int], AdjointPlan]
    """(num_steps, seed, update, micro_batch) to the plan: the same on every rank."""
    cost: Callable[[int, bool], Mapping[str, float]]
    """(num_steps, guided) to denoiser 'forwards' and 'backwards' per sample, the mean over random plans."""


def full() -> Estimator:
    """The exact gradient of the discretised objective: every step is swept with weight 1.

    Unbiased: autograd through the whole graph, to rounding. Cost: 3 T forwards (rollout; policy and reference in the
    sweep), 2 T backwards.
    """
    return Estimator(
        "full",
        needs_cotangent=True,
        plan=lambda num_steps, seed, update, micro_batch: AdjointPlan((1.0,) * num_steps, 0, "policy"),
        cost=lambda num_steps, guided: _cost(3 * num_steps, 2 * num_steps, guided),
    )


def last_k(steps: int) -> Estimator:
    """Only the last `steps` steps are swept (DRaFT-K, Clark et al. 2024); those before get no gradient.

    Biased: unbiased for the derivative by the last steps' use of the parameters only, so it reaches too small a
    reward. Cost with K = steps: T + 2 K forwards, 2 K backwards.
    """

    def plan(num_steps: int, seed: int, update: int, micro_batch: int) -> AdjointPlan:
        first = _first_of_last(num_steps, steps)
        return AdjointPlan((0.0,) * first + (1.0,) * (num_steps - first), first, "policy")

    return Estimator(
        "last_k",
        needs_cotangent=True,
        plan=plan,
        cost=lambda num_steps, guided: _cost(num_steps + 2 * steps, 2 * steps, guided),
    )


def random_suffix(full_probability: float = 0.3) -> Estimator:
    """One draw of K per micro-batch: steps k ≥ K are swept, step k's parameter gradient weighted by 1 / P(K ≤ k).

    K = 0 with `full_probability`, else uniform over 1 … T − 1. Unbiased before gradient clipping: λ_{k+1} depends on
    steps above k only, all of them kept, so E Σ 1{K ≤ k} g_k / P(K ≤ k) = Σ g_k. The weights inflate the gradient's
    norm. Cost: T + 2 S forwards, 2 S backwards, with S = T − (1 − full_probability) T / 2 swept steps on average.
    """

    def plan(num_steps: int, seed: int, update: int, micro_batch: int) -> AdjointPlan:
        draw = draw_uniform(seed, update, micro_batch, "random_suffix")
        first = 0
        if draw >= full_probability and num_steps > 1:
            first = 1 + int((draw - full_probability) / (1 - full_probability) * (num_steps - 1))
        kept = [full_probability + (1 - full_probability) * _share(k, num_steps) for k in range(num_steps)]
        weights = tuple(1.0 / kept[k] if k >= first else 0.0 for k in range(num_steps))
        return AdjointPlan(weights, first, "policy")

    def cost(num_steps: int, guided: bool) -> Mapping[str, float]:
        swept = num_steps - (1 - full_probability) * num_steps / 2 if num_steps > 1 else 1.0
        return _cost(num_steps + 2 * swept, 2 * swept, guided)

    return Estimator("random_suffix", needs_cotangent=True, plan=plan, cost=cost)


def adjoint_matching(matched_steps: int = 0) -> Estimator:
    """The policy is regressed on the lean adjoint, which the *reference* alone carries back (Domingo-Enrich et al. 2025).

    Per matched step, with h_k detached: ⟨mean_k, a_{k+1}⟩ + kl_coef KL_k. matched_steps of the T steps are chosen, one
    in each of so many equal strata, weighted by 1 / P(chosen); 0 matches all.
    Not the gradient of the objective away from the optimum; its fixed point is the fixed-variance optimum, which it
    reaches with less variance, because nothing goes back through the trained network. Unbiased over the choice of
    steps. Cost with M matched steps: 2 T + M forwards (rollout; reference; policy), T + M backwards.
    """

    def plan(num_steps: int, seed: int, update: int, micro_batch: int) -> AdjointPlan:
        count = min(matched_steps or num_steps, num_steps)
        borders = [round(stratum * num_steps / count) for stratum in range(count + 1)]
        weights = [0.0] * num_steps
        for stratum, (low, high) in enumerate(zip(borders, borders[1:], strict=False)):
            draw = draw_uniform(seed, update, micro_batch, f"adjoint_matching {stratum}")
            weights[low + int(draw * (high - low))] = float(high - low)
        return AdjointPlan(tuple(weights), 0, "reference")

    def cost(num_steps: int, guided: bool) -> Mapping[str, float]:
        matched = min(matched_steps or num_steps, num_steps)
        return _cost(2 * num_steps + matched, num_steps + matched, guided)

    return Estimator("adjoint_matching", needs_cotangent=True, plan=plan, cost=cost)


def reinforce() -> Estimator:
    """Score-function gradient with returns-to-go, and the direct gradient of each step's KL; the reward needs none.

    Step k's return is Σ_c γ_c log p_c − kl_coef Σ_{j>k} KL_j, less the mean return of the other samples of its group
    (same prompt and label: `group_size`). Unbiased; its variance is the largest of all, so take large batches. Not
    divided by the standard deviation of the returns, which would move the optimum. Cost: 3 T forwards, T backwards.
    """
    return Estimator(
        "reinforce",
        needs_cotangent=False,
        plan=lambda num_steps, seed, update, micro_batch: AdjointPlan((1.0,) * num_steps, 0, "score"),
        cost=lambda num_steps, guided: _cost(3 * num_steps, num_steps, guided),
    )


def make_estimator(config: EstimatorConfig, num_steps: int) -> Estimator:
    """The estimator that a configuration names, for a sampler of `num_steps` steps."""
    if config.name in ("last_k", "adjoint_matching") and config.steps > num_steps:
        raise ConfigError(
            f"estimator.steps is {config.steps}, but the sampler has {num_steps} steps (sampler.num_steps); lower it"
        )
    makers: dict[str, Callable[[], Estimator]] = {
        "full": full,
        "last_k": lambda: last_k(config.steps or 1),
        "random_suffix": lambda: random_suffix(config.full_probability),
        "adjoint_matching": lambda: adjoint_matching(config.steps),
        "reinforce": reinforce,
    }
    return makers[config.name]()


def _first_of_last(num_steps: int, steps: int) -> int:
    if not 1 <= steps <= num_steps:
        raise ConfigError(f"last_k sweeps {steps} steps; expected 1 to {num_steps}, the sampler's number of steps")
    return num_steps - steps


def _share(k: int, num_steps: int) -> float:
    """P(K ≤ k) for K uniform over 1 … T − 1."""
    return k / (num_steps - 1) if num_steps > 1 else 1.0


def _cost(forwards: float, backwards: float, guided: bool) -> dict[str, float]:
    branches = 2 if guided else 1
    return {"forwards": float(forwards * branches), "backwards": float(backwards * branches)}
