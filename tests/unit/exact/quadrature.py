"""The exact answers a second time, by Gauss–Hermite quadrature backward in time: no grid of probabilities, no law that is
propagated, as the package's solver has them. What both share is the reference chain's equations."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.special import ndtr

from ctrl_ray.exact.chain import Step, reference_chain
from ctrl_ray.exact.problems import Array, Problem

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(48)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


@dataclass(frozen=True)
class Moments:
    """Of coordinate 0 of x_0."""

    p_positive: float
    mean: float
    std: float


@dataclass(frozen=True)
class Answers:
    """As in `ctrl_ray.exact.grid.Solution`."""

    tilt: Moments
    free: Moments
    optimum: Moments
    log_z: float
    free_objective: float
    objective: float
    """Of the optimum."""


def solve_by_quadrature(problem: Problem, num_points: int = 500, reach: float = 9.0) -> Answers:
    """Everything is a function of x_k at `num_points` points, with a cubic spline between them; 500 are enough for six
    digits.

    With h = E[exp(r / β) | x_k] and g = E[f exp(r / β) | x_k] of the reference: the tilt's mean of f is E g / E h over
    x_T ~ N(0, 1), that of Doob's transform E (g / h), log Z = β log E h. The best means maximise
    W(m) − β (m − reference)² / (2 σ²) with W(m) = E V(m + σ z), step by step from the last.
    """
    x = np.linspace(-reach, reach, num_points)
    chain, beta = reference_chain(problem.mixture, problem.sampler), problem.kl_coef

    def reward(at: Array) -> Array:
        return np.asarray(problem.guidance_strengths[0] * problem.rewards[0].log_prob(at))

    references = [step.mean(x) for step in chain]
    tilted = _backward(x, chain, references, lambda at: np.exp(reward(at) / beta))
    h, of_tilt = tilted[:, :1], tilted[:, 1:]
    best, value = _best_means(x, chain, references, reward, beta)
    of_optimum = _backward(x, chain, best, np.ones_like)[:, 1:]
    return Answers(
        tilt=_moments(_start(x, of_tilt) / _start(x, h)),
        free=_moments(_start(x, of_tilt / h)),
        optimum=_moments(_start(x, of_optimum)),
        log_z=float(beta * np.log(_start(x, h)[0])),
        free_objective=float(_start(x, beta * np.log(h))[0]),
        objective=float(_start(x, value[:, None])[0]),
    )


def _expect(x: Array, values: Array, means: Array, std: float) -> Array:
    """E values(m + std z) for every mean; beyond the points, values stay what they are at the last one."""
    spline = CubicSpline(x, values)
    total = np.zeros((len(means), *values.shape[1:]))
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        total += weight * spline(np.clip(means + std * node, x[0], x[-1]))
    return total


def _start(x: Array, values: Array) -> Array:
    """The mean over x_T ~ N(0, 1), by the trapezoid rule."""
    density = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    return np.asarray((density[:, None] * values).sum(0) * (x[1] - x[0]))


def _backward(x: Array, chain: list[Step], means: list[Array], weight: Callable[[Array], Array]) -> Array:
    """E[weight(x_0) (1, 1{x_0 > 0}, x_0, x_0²) | x_T] at the points, (N, 4)."""
    last = chain[-1]
    at = means[-1][:, None] + last.std * _NODES
    moments = np.stack([weight(at), np.zeros_like(at), weight(at) * at, weight(at) * at**2]) @ _WEIGHTS
    moments[1] = moments[0] * ndtr(means[-1] / last.std)  # the weight hardly changes within the last step's noise
    values = moments.T
    for step, mean in zip(reversed(chain[:-1]), reversed(means[:-1]), strict=True):
        values = _expect(x, values, mean, step.std)
    return values


def _best_means(
    x: Array, chain: list[Step], references: list[Array], reward: Callable[[Array], Array], beta: float
) -> tuple[list[Array], Array]:
    value, best = reward(x), []
    for step, reference in zip(reversed(chain), reversed(references), strict=True):
        expected = _expect(x, value, x, step.std)
        offsets = step.std * np.linspace(-8, 8, 161)
        candidates = np.clip(reference[:, None] + offsets, x[0], x[-1])
        penalty = beta / (2 * step.std**2)
        scores = CubicSpline(x, expected)(candidates) - penalty * (candidates - reference[:, None]) ** 2
        top = np.clip(scores.argmax(1), 1, len(offsets) - 2)
        rows = np.arange(len(x))
        left, middle, right = (scores[rows, top + shift] for shift in (-1, 0, 1))
        bend = np.minimum(left - 2 * middle + right, -1e-12)
        mean = candidates[rows, top] + np.clip(0.5 * (left - right) / bend, -1, 1) * (offsets[1] - offsets[0])
        mean = np.clip(mean, x[0], x[-1])
        value = _expect(x, value, mean, step.std) - penalty * (mean - reference) ** 2
        best.append(mean)
    return best[::-1], value


def _moments(values: Array) -> Moments:
    p_positive, mean, square = (float(value) for value in values)
    return Moments(p_positive, mean, math.sqrt(square - mean**2))
