"""How far an adapter's samples are from exact samples of their target, one joint class and one statistic at a time.

Each distance is shown beside the same distance between two disjoint halves of the exact samples, the noise floor. All sides
of a distance have the same prompts, as often: the target is a law of images for each prompt, and rejection takes more
samples of the prompts that suit the class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import ks_2samp, wasserstein_distance

from ctrl_ray.config import ControlConfig
from ctrl_ray.verification.measured import Measured
from ctrl_ray.verification.target import JointClass

Distance = Callable[[np.ndarray, np.ndarray], float]
FEWEST_A_SIDE = 10
"""Samples that a distance needs."""
_FEATURE_BOOTSTRAPS = 3
"""A kernel matrix costs more than a sort, and its value varies less."""


@dataclass(frozen=True)
class Comparison:
    """One distance of one joint class."""

    statistic: str
    """A control (its oracle's value), 'log p(CONTROL)' (the classifier's, of the class), a value of any image, 'features'."""
    distance: str
    reached: float
    """Fine-tuned against exact samples, mean over the bootstraps."""
    floor: float
    """Exact samples against exact samples."""
    before: float
    """Pre-trained samples against exact samples: where the fine-tuning started."""
    num_samples: int
    """Samples on each side."""
    num_prompts: int
    """Prompts with enough exact samples; the others are on no side."""

    @property
    def ratio(self) -> float:
        """reached / floor; 1 is as good as exact."""
        if self.floor > 0:
            return self.reached / self.floor
        return math.inf if self.reached > 0 else 1.0

    def to_row(self) -> dict[str, Any]:
        """As results.json holds it; a ratio that is not finite is None."""
        ratio = self.ratio if math.isfinite(self.ratio) else None
        return {
            **{name: getattr(self, name) for name in ("statistic", "distance", "reached", "floor", "before")},
            **{"ratio": ratio, "num_samples": self.num_samples, "num_prompts": self.num_prompts},
        }


def own_distance(name: str, control: ControlConfig) -> tuple[str, str]:
    """(statistic, distance) that a control is judged by: its oracle's value, else its classifier's log-probability, whose law
    is so narrow at large exponents that only its order tells (Kolmogorov–Smirnov)."""
    return (name, "Wasserstein") if control.oracle else (log_prob_name(name), "Kolmogorov–Smirnov")


def log_prob_name(control: str) -> str:
    """The statistic's name."""
    return f"log p({control})"


def statistics_of(samples: Measured, joint: JointClass, controls: Sequence[str]) -> dict[str, np.ndarray]:
    """Every statistic of N samples, for one joint class: (N,) each, the features (N, 1024)."""
    log_probs = {
        log_prob_name(name): samples.class_log_probs[name][:, label].astype(np.float64)
        for name, label in zip(controls, joint.labels, strict=True)
    }
    own = {name: samples.values[name] for name in controls if name in samples.values}
    return {**own, **log_probs, **samples.values, "features": samples.features}


def asked_for(samples: Measured, joint: JointClass) -> np.ndarray:
    """Rows of the samples that were asked for this class."""
    return np.flatnonzero((samples.labels == np.array(joint.labels)).all(axis=1))


def compare(
    pool: Measured,
    exact: np.ndarray,
    tuned: Measured,
    joint: JointClass,
    controls: Mapping[str, ControlConfig],
    *,
    seed: int = 0,
    num_bootstraps: int = 20,
) -> list[Comparison]:
    """Distances between the fine-tuned samples that were asked for `joint` and the pool's exact samples of it.

    exact: (N,) bool, rows of the pool. Empty where there are not FEWEST_A_SIDE samples for each side.
    """
    groups = match(pool, exact, tuned, joint)
    if sum(group.size for group in groups) < FEWEST_A_SIDE:
        return []
    rng = np.random.default_rng(seed)
    draws = [_Draw.make(rng, groups) for _ in range(num_bootstraps)]
    theirs, ours = (statistics_of(samples, joint, list(controls)) for samples in (pool, tuned))
    of_controls = {*controls, *map(log_prob_name, controls)}
    comparisons = []
    for statistic in theirs:
        for name, distance in _distances(statistic, of_controls).items():
            few = draws[:_FEATURE_BOOTSTRAPS] if statistic == "features" else draws
            means = np.mean([_of_draw(distance, draw, theirs[statistic], ours[statistic]) for draw in few], axis=0)
            reached_at, floor, before = means.tolist()
            of_class = (sum(group.size for group in groups), sum(group.size > 0 for group in groups))
            comparisons.append(Comparison(statistic, name, reached_at, floor, before, *of_class))
    return comparisons


@dataclass(frozen=True, eq=False)
class PromptRows:
    """Row numbers of one prompt."""

    pool: np.ndarray
    """Of all pre-trained samples."""
    exact: np.ndarray
    """Of those that are exact samples of the class."""
    reached: np.ndarray
    """Of the fine-tuned samples that were asked for the class."""

    @property
    def size(self) -> int:
        """How many can be put on each side, with as many exact ones left for the noise floor."""
        return min(len(self.exact) // 2, len(self.reached))


def match(pool: Measured, exact: np.ndarray, tuned: Measured, joint: JointClass) -> list[PromptRows]:
    """The rows of every prompt that both sides have."""
    reached = np.zeros(len(tuned), dtype=bool)
    reached[asked_for(tuned, joint)] = True
    of_pool, of_tuned = np.array(pool.prompts), np.array(tuned.prompts)
    groups = []
    for prompt in sorted(set(pool.prompts) & set(tuned.prompts)):
        theirs = of_pool == prompt
        rows = (np.flatnonzero(each) for each in (theirs, theirs & exact, (of_tuned == prompt) & reached))
        groups.append(PromptRows(*rows))
    return groups


@dataclass(frozen=True)
class _Draw:
    """Row numbers of one bootstrap, with equal prompts; `exact` and `other` are disjoint."""

    exact: np.ndarray
    other: np.ndarray
    reached: np.ndarray
    any: np.ndarray

    @classmethod
    def make(cls, rng: np.random.Generator, groups: Sequence[PromptRows]) -> _Draw:
        parts = []
        for group in groups:
            shuffled = rng.permutation(group.exact)
            chosen = [rng.choice(rows, group.size, replace=False) for rows in (group.reached, group.pool)]
            parts.append((shuffled[: group.size], shuffled[group.size : 2 * group.size], *chosen))
        return cls(*(np.concatenate(rows) for rows in zip(*parts, strict=True)))


def _of_draw(distance: Distance, draw: _Draw, theirs: np.ndarray, ours: np.ndarray) -> tuple[float, float, float]:
    exact = theirs[draw.exact]
    return distance(ours[draw.reached], exact), distance(theirs[draw.other], exact), distance(theirs[draw.any], exact)


def mmd(one: np.ndarray, other: np.ndarray) -> float:
    """Maximum mean discrepancy (Gretton et al. 2012, eq. 5, V-statistic's root), RBF kernel at the median distance."""
    both = np.concatenate([one, other]).astype(np.float32)
    squares = (both**2).sum(1)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * both @ both.T, 0)
    positive = distances[distances > 0]
    if not len(positive):
        return 0.0
    kernel = np.exp(-distances / np.median(positive))
    n = len(one)
    value = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
    return float(math.sqrt(max(0.0, float(value))))


def _ks(one: np.ndarray, other: np.ndarray) -> float:
    return float(ks_2samp(one, other).statistic)


def _wasserstein(one: np.ndarray, other: np.ndarray) -> float:
    return float(wasserstein_distance(one, other))


def _distances(statistic: str, of_controls: set[str]) -> dict[str, Distance]:
    if statistic == "features":
        return {"MMD": mmd}
    second: dict[str, Distance] = {"Kolmogorov–Smirnov": _ks} if statistic in of_controls else {}
    return {"Wasserstein": _wasserstein, **second}
