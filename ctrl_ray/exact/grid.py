"""Dynamic programming on a grid, with Gaussian kernels integrated over bins: exact answers for mixtures.

For a problem on one coordinate: (a) the tilt of the discrete sampler's law, (b) the best policy with any kernels and
the initial noise as it is, (c) the best policy that only moves the means, which is CTRL's class; and the law and the
value of any policy of that class, by propagating its kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.special import logsumexp, ndtr

from ctrl_ray.exact.chain import Step, reference_chain
from ctrl_ray.exact.problems import Array, Problem

_REACH = 8.5  # standard deviations of a kernel that are kept
_PUSHES = np.linspace(-8.0, 8.0, 65)  # candidates for (policy mean − reference mean) / std


@dataclass(frozen=True)
class Grid:
    """Bins of one coordinate."""

    edges: Array
    """(N + 1,)."""

    @property
    def centres(self) -> Array:
        """(N,)."""
        return (self.edges[1:] + self.edges[:-1]) / 2

    @property
    def width(self) -> float:
        """Width of a bin."""
        return float(self.edges[1] - self.edges[0])

    def initial(self) -> Array:
        """Probabilities of x_T ~ N(0, 1)."""
        mass = np.diff(ndtr(self.edges))
        return mass / mass.sum()


def make_grid(problem: Problem, num_bins: int = 1200) -> Grid:
    """Wide enough for the noise, the data and the reward's pull; fine enough for the smallest step."""
    mixture = problem.mixture
    reach = max(abs(m) + 6 * s for m, s in zip(mixture.means, mixture.stds, strict=True))
    reach = max(reach, 7.0, *(abs(getattr(reward, "target", 0.0)) + 2 for reward in problem.rewards))
    return Grid(np.linspace(-reach, reach, num_bins + 1))


@dataclass(frozen=True)
class Kernel:
    """Bin-to-bin probabilities of one step, a band of columns for each row."""

    columns: Array
    """(N, W) indices."""
    mass: Array
    """(N, W), rows sum to 1."""

    def forward(self, law: Array) -> Array:
        """Law of the next bin."""
        moved = np.bincount(self.columns.ravel(), weights=(law[:, None] * self.mass).ravel(), minlength=len(law))
        return np.asarray(moved)

    def expect(self, values: Array) -> Array:
        """E[values(x') | x]."""
        return np.asarray((self.mass * values[self.columns]).sum(1))

    def log_expect_exp(self, values: Array) -> Array:
        """log E[exp values(x') | x]."""
        return np.asarray(logsumexp(values[self.columns], b=self.mass, axis=1))


def make_kernel(grid: Grid, means: Array, std: float) -> Kernel:
    """x' ~ N(means, std²) integrated over the bins; what would leave the grid stays in its last bin. Where std is 0, a bin is
    spread evenly over what lies between the means half-way to its neighbours'."""
    count = len(means)
    if std == 0:
        return _moved(grid, means)
    half = int(np.ceil(_REACH * std / grid.width)) + 1
    width = min(2 * half + 1, count)
    first = np.clip(np.floor((means - grid.edges[0]) / grid.width).astype(int) - half, 0, count - width)
    columns = first[:, None] + np.arange(width)
    mass = np.diff(ndtr((grid.edges[first[:, None] + np.arange(width + 1)] - means[:, None]) / std), axis=1)
    total = mass.sum(1, keepdims=True)
    mass = np.where(total > 1e-12, mass / np.maximum(total, 1e-300), 1.0 / width)
    return Kernel(columns, mass)


def _moved(grid: Grid, means: Array) -> Kernel:
    """x' = mean(x)."""
    count, middles = len(means), (means[1:] + means[:-1]) / 2
    ends = np.concatenate([[2 * means[0] - middles[0]], middles, [2 * means[-1] - middles[-1]]])
    ends = np.clip(ends, grid.edges[0], grid.edges[-1])
    low, high = np.minimum(ends[:-1], ends[1:]), np.maximum(ends[:-1], ends[1:])
    width = min(int(np.ceil((high - low).max() / grid.width)) + 1, count)
    first = np.clip(np.floor((low - grid.edges[0]) / grid.width).astype(int), 0, count - width)
    columns = first[:, None] + np.arange(width)
    left, right = grid.edges[columns], grid.edges[columns + 1]
    mass = np.clip(np.minimum(right, high[:, None]) - np.maximum(left, low[:, None]), 0, None)
    total = mass.sum(1, keepdims=True)
    nearest = np.arange(width) == np.clip((low - grid.edges[first]) / grid.width, 0, width - 1).astype(int)[:, None]
    return Kernel(columns, np.where(total > 1e-12, mass / np.maximum(total, 1e-300), nearest))


@dataclass(frozen=True)
class Answer:
    """A law of x_0 on the grid, and the value of what led to it."""

    law: Array
    """(N,) probabilities of the bins."""
    mean: float
    std: float
    p_positive: float
    kl: float
    """Nats, of the trajectory; of the tilt: KL of x_0 to the sampler's law."""
    objective: float
    """guidance_strength · E log p − kl_coef · KL."""


@dataclass(frozen=True)
class Solution:
    """Everything that is known about one coordinate of a problem."""

    grid: Grid
    base: Answer
    tilt: Answer
    """p(x_0) p(y|x_0)^(guidance_strength / kl_coef): what CTRL promises."""
    free: Answer
    """The best policy with free kernels; it cannot move the initial noise."""
    optimum: Answer
    """The best policy with fixed variances: what training can reach."""
    log_z: float
    """kl_coef · log E p(y|x_0)^(guidance_strength / kl_coef), the upper bound of every objective."""
    policy_means: tuple[Array, ...]
    """Mean of the optimum at the bins' centres, step by step."""


def solve_on_grid(problem: Problem, coordinate: int = 0, num_bins: int = 1200, *, controlled_from: int = 0) -> Solution:
    """The exact answers for one coordinate of a problem (they are independent of each other).

    controlled_from: the optimum leaves the steps before it to the reference (what `last_k` can reach).
    """
    grid = make_grid(problem, num_bins)
    chain = reference_chain(problem.mixture, problem.sampler)
    reward = problem.guidance_strengths[coordinate] * problem.rewards[coordinate].log_prob(grid.centres)
    beta = problem.kl_coef
    references = [step.mean(grid.centres) for step in chain]
    kernels = [make_kernel(grid, means, step.std) for means, step in zip(references, chain, strict=True)]
    base_law = grid.initial()
    for kernel in kernels:
        base_law = kernel.forward(base_law)
    values = [reward]
    for kernel in reversed(kernels):
        values.append(beta * kernel.log_expect_exp(values[-1] / beta))
    values.reverse()
    best = _best_means(grid, chain, references, reward, beta)
    best[:controlled_from] = references[:controlled_from]
    return Solution(
        grid=grid,
        base=_answer(grid, base_law, reward, 0.0, beta),
        tilt=_tilt(grid, base_law, reward, beta),
        free=_free(grid, kernels, values, beta),
        optimum=policy_answer(problem, grid, best, coordinate),
        log_z=float(beta * logsumexp(values[0] / beta, b=grid.initial())),
        policy_means=tuple(best),
    )


def policy_answer(problem: Problem, grid: Grid, means: Sequence[Array], coordinate: int = 0) -> Answer:
    """Law and value of a policy of fixed variance, given its means at the bins' centres for every step."""
    chain = reference_chain(problem.mixture, problem.sampler)
    reward = problem.guidance_strengths[coordinate] * problem.rewards[coordinate].log_prob(grid.centres)
    law, kl = grid.initial(), 0.0
    for step, mean in zip(chain, means, strict=True):
        if step.std > 0:
            kl += float(law @ ((mean - step.mean(grid.centres)) ** 2 / (2 * step.std**2)))
        law = make_kernel(grid, mean, step.std).forward(law)
    return _answer(grid, law, reward, kl, problem.kl_coef)


def total_variation(one: Array, other: Array) -> float:
    """Half the L1 distance of two laws on the same grid, in [0, 1]."""
    return float(0.5 * np.abs(one - other).sum())


def _answer(grid: Grid, law: Array, reward: Array, kl: float, beta: float) -> Answer:
    x = grid.centres
    mean = float(law @ x)
    std = float(np.sqrt(law @ (x - mean) ** 2))
    positive = float(law[x > 0].sum())
    return Answer(law, mean, std, positive, kl, float(law @ reward) - beta * kl)


def _tilt(grid: Grid, base: Array, reward: Array, beta: float) -> Answer:
    with np.errstate(divide="ignore"):
        log_weights = np.log(base) + reward / beta
    law = np.exp(log_weights - logsumexp(log_weights))
    held = law > 0
    kl = float(law[held] @ np.log(law[held] / base[held]))
    return _answer(grid, law, reward, kl, beta)


def _free(grid: Grid, kernels: Sequence[Kernel], values: Sequence[Array], beta: float) -> Answer:
    """Doob's transform of every kernel: p(x'|x) exp((V(x') − V(x)) / β)."""
    law = grid.initial()
    start = float(law @ values[0])
    for kernel, here, there in zip(kernels, values[:-1], values[1:], strict=True):
        tilted = kernel.mass * np.exp((there[kernel.columns] - here[:, None]) / beta)
        law = Kernel(kernel.columns, tilted).forward(law)
    kl = (float(law @ values[-1]) - start) / beta
    return _answer(grid, law, values[-1], kl, beta)


def _best_means(
    grid: Grid, chain: Sequence[Step], references: Sequence[Array], reward: Array, beta: float
) -> list[Array]:
    """Backward in time: max over m of E[W(m + σ z)] − β (m − reference)² / (2 σ²), in every bin."""
    value, best = reward, []
    low, high = grid.centres[0], grid.centres[-1]
    for step, reference in zip(reversed(chain), reversed(references), strict=True):
        if step.std == 0:  # nothing to choose
            value = CubicSpline(grid.centres, value)(np.clip(reference, low, high))
            best.append(reference)
            continue
        smoothed = CubicSpline(grid.centres, make_kernel(grid, grid.centres, step.std).expect(value))
        slope, curvature = smoothed.derivative(1), smoothed.derivative(2)
        weight = beta / step.std**2
        candidates = np.clip(reference[:, None] + step.std * _PUSHES, low, high)
        scores = smoothed(candidates) - 0.5 * weight * (candidates - reference[:, None]) ** 2
        mean = candidates[np.arange(len(reference)), scores.argmax(1)]
        for _ in range(20):  # Newton, where the objective is concave
            bend = curvature(mean) - weight
            step_size = (slope(mean) - weight * (mean - reference)) / np.minimum(bend, -0.05 * weight)
            mean = np.clip(mean - np.clip(step_size, -step.std, step.std), low, high)
        value = smoothed(mean) - 0.5 * weight * (mean - reference) ** 2
        best.append(mean)
    return best[::-1]
