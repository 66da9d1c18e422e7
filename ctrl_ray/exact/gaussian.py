"""Closed forms where everything is Gaussian: the tilt of the sampler's law, and the best fixed-variance policy."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ctrl_ray.errors import ConfigError
from ctrl_ray.exact.chain import reference_chain
from ctrl_ray.exact.problems import GaussianReward, Problem


@dataclass(frozen=True)
class GaussianAnswer:
    """Law of x_0 and the value of what led to it."""

    mean: float
    std: float
    kl: float
    """Nats; of the tilt: KL to the sampler's law."""
    objective: float


@dataclass(frozen=True)
class GaussianSolution:
    """The exact answers of a Gaussian problem."""

    base: GaussianAnswer
    tilt: GaussianAnswer
    optimum: GaussianAnswer
    """The best policy of fixed variance."""


def is_gaussian(problem: Problem, coordinate: int = 0) -> bool:
    """Whether one coordinate of a problem has a closed form: a one-component mixture and a Gaussian reward."""
    return len(problem.mixture.means) == 1 and isinstance(problem.rewards[coordinate], GaussianReward)


def solve_gaussian(problem: Problem, coordinate: int = 0, *, controlled_from: int = 0) -> GaussianSolution:
    """Riccati recursion for one coordinate of a problem (`is_gaussian`).

    controlled_from: the optimum leaves the steps before it to the reference (what `last_k` can reach). With affine steps
    x' = A x + B + σ z and the quadratic value −P x²/2 + q x + r, the best mean is (A x + B + q σ²/β) / (1 + P σ²/β).
    Raises ConfigError for another kind of problem.
    """
    reward = problem.rewards[coordinate]
    if not is_gaussian(problem, coordinate) or not isinstance(reward, GaussianReward):
        raise ConfigError(f"problem {problem.name} is not Gaussian: it needs one component and a Gaussian reward")
    strength, beta = problem.guidance_strengths[coordinate], problem.kl_coef
    affine = []
    for step in reference_chain(problem.mixture, problem.sampler):
        at_0, at_1 = step.mean(np.array([0.0, 1.0]))
        affine.append((float(at_1 - at_0), float(at_0), step.std))
    base_mean, base_variance = _moments(affine, [(1.0, 0.0)] * len(affine))
    curvature, slope = strength / reward.std**2, strength * reward.target / reward.std**2
    policies = []
    for step_index, (scale, offset, std) in reversed(list(enumerate(affine))):
        gain = std**2 / beta if step_index >= controlled_from else 0.0
        shrink = 1 / (1 + curvature * gain)
        policies.append((shrink, shrink * slope * gain))
        curvature, slope = curvature * shrink, slope * shrink
        slope = scale * (slope - curvature * offset)
        curvature = scale**2 * curvature
    policies.reverse()
    mean, variance = _moments(affine, policies)
    kl = _policy_kl(affine, policies)
    return GaussianSolution(
        base=GaussianAnswer(
            base_mean, math.sqrt(base_variance), 0.0, strength * _reward(reward, base_mean, base_variance)
        ),
        tilt=_tilt(base_mean, base_variance, reward, strength, beta),
        optimum=GaussianAnswer(mean, math.sqrt(variance), kl, strength * _reward(reward, mean, variance) - beta * kl),
    )


def _moments(affine: list[tuple[float, float, float]], policies: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean and variance of x_0 from x_T ~ N(0, 1), each step's mean m replaced by a m + b."""
    mean, variance = 0.0, 1.0
    for (scale, offset, std), (factor, shift) in zip(affine, policies, strict=True):
        mean = factor * (scale * mean + offset) + shift
        variance = (factor * scale) ** 2 * variance + std**2
    return mean, variance


def _policy_kl(affine: list[tuple[float, float, float]], policies: list[tuple[float, float]]) -> float:
    """Σ_k E (policy mean − reference mean)² / (2 σ²)."""
    total, mean, variance = 0.0, 0.0, 1.0
    for (scale, offset, std), (factor, shift) in zip(affine, policies, strict=True):
        ref_mean, ref_variance = scale * mean + offset, scale**2 * variance
        if std > 0:
            total += (((factor - 1) * ref_mean + shift) ** 2 + (factor - 1) ** 2 * ref_variance) / (2 * std**2)
        mean, variance = factor * ref_mean + shift, factor**2 * ref_variance + std**2
    return total


def _tilt(mean: float, variance: float, reward: GaussianReward, strength: float, beta: float) -> GaussianAnswer:
    """N(mean, variance) tilted by N(target; x, std²)^(strength / beta)."""
    precision = strength / beta / reward.std**2
    tilted_variance = 1 / (1 / variance + precision)
    tilted_mean = tilted_variance * (mean / variance + precision * reward.target)
    kl = 0.5 * (
        tilted_variance / variance + (tilted_mean - mean) ** 2 / variance - 1 - math.log(tilted_variance / variance)
    )
    objective = strength * _reward(reward, tilted_mean, tilted_variance) - beta * kl
    return GaussianAnswer(tilted_mean, math.sqrt(tilted_variance), kl, objective)


def _reward(reward: GaussianReward, mean: float, variance: float) -> float:
    """E log N(target; x, std²) for x ~ N(mean, variance)."""
    squared = (reward.target - mean) ** 2 + variance
    return -0.5 * squared / reward.std**2 - math.log(reward.std) - 0.5 * math.log(2 * math.pi)
