"""Exact samples of a target, by rejection from the pre-trained model.

The target of joint class y is p_pre(x|c) Π_c p̂_c(y_c|x,c)^λ_c / Z(c, y). A pre-trained sample x that is accepted with
probability a_y(x) = Π_c p̂_c(y_c|x,c)^λ_c (at most 1, for p̂ is a classifier) is an exact sample of it, at any λ ≥ 0
(von Neumann 1951); Z is the mean of a_y. Where every λ is 1 the a_y of all classes sum to 1: one class is drawn from the
classifiers for each sample, and none is wasted. Elsewhere each class accepts by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ctrl_ray.diffusion.noise import draw_key
from ctrl_ray.verification.measured import Measured
from ctrl_ray.verification.target import JointClass, log_tilts

_LARGEST_GROWTH = 8
_MARGIN = 1.05


@dataclass(frozen=True, eq=False)
class Pool:
    """Pre-trained samples and what was accepted of them."""

    samples: Measured
    accepted: np.ndarray
    """(J, N) bool: for each joint class, which of the samples are exact samples of its target."""
    rates: np.ndarray
    """(J,) mean acceptance probability, which is Z of the class over all prompts."""


def accept(
    class_log_probs: Mapping[str, np.ndarray],
    exponents: Mapping[str, float],
    classes: Sequence[JointClass],
    sample_ids: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Which of N pre-trained samples each of J joint classes accepts, (J, N) bool, by draws keyed by (seed, sample id).

    class_log_probs: Control to (N, K); exponents: λ of each control. At λ = 1 throughout, every sample is of one class.
    """
    if all(exponent == 1 for exponent in exponents.values()):
        uniform = _uniform(seed, sample_ids, len(exponents))
        drawn = [_draw(class_log_probs[name], uniform[:, column]) for column, name in enumerate(exponents)]
        return np.stack(
            [np.all([y == label for y, label in zip(drawn, j.labels, strict=True)], axis=0) for j in classes]
        )
    uniform = _uniform(seed, sample_ids, len(classes))
    return np.exp(log_tilts(class_log_probs, exponents, classes)) > uniform.T


def _draw(log_probs: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    """y ~ p̂(y|x,c), (N,) int, of log-probabilities (N, K)."""
    cumulative = np.exp(log_probs.astype(np.float64)).cumsum(axis=1)
    return (uniform[:, None] * cumulative[:, -1:] >= cumulative[:, :-1]).sum(axis=1)


def _uniform(seed: int, sample_ids: np.ndarray, count: int) -> np.ndarray:
    """(N, count) in [0, 1)."""
    generators = (np.random.default_rng(draw_key(seed, 0, int(i), "acceptance")) for i in sample_ids)
    return np.stack([generator.random(count) for generator in generators])


def grow_pool(
    draw: Callable[[int], Measured],
    exponents: Mapping[str, float],
    classes: Sequence[JointClass],
    *,
    unit: int,
    worth: int,
    wanted: int,
    limit: int,
    seed: int,
    say: Callable[[str], None],
) -> Pool:
    """Draw pre-trained samples in rounds until every joint class has `wanted` exact ones, or `limit` samples are drawn.

    The acceptance rates found so far say how many a round needs. A class of which `limit` samples would not give even
    `worth` exact ones asks for no more.

    Args:
        draw: The first n samples, whatever was drawn of them before.
        unit: Rounds draw multiples of it, so that all prompts occur equally often; one at least, also above `limit`.
    """
    limit = max(unit, limit // unit * unit)
    total = min(limit, -(-wanted // unit) * unit)
    while True:
        samples = draw(total)
        accepted = accept(samples.class_log_probs, exponents, classes, samples.sample_ids, seed)
        rates = np.exp(log_tilts(samples.class_log_probs, exponents, classes)).mean(axis=1)
        counts = accepted.sum(axis=1)
        open_classes = np.flatnonzero((counts < wanted) & (rates * limit >= worth))
        if total == limit or not len(open_classes):
            return Pool(samples, accepted, rates)
        rarest = open_classes[np.argmin(rates[open_classes])]
        needed = total + _MARGIN * (wanted - counts[open_classes]) / rates[open_classes]
        total = min(limit, -(-math.ceil(min(needed.max(), _LARGEST_GROWTH * total)) // unit) * unit)
        say(
            f"{counts[rarest]} of {len(samples)} pre-trained samples are exact samples of {classes[rarest].name!r} "
            f"(wanted: {wanted}); going on to {total}"
        )


def fewest(num_prompts: int) -> int:
    """Exact samples of a class that it takes to put ten on each side with the same prompts (a prompt with an odd number of
    them leaves one over)."""
    return 20 + num_prompts


def shortage(name: str, pool: Pool, index: int, num_prompts: int) -> str:
    """Why a joint class has too few exact samples to be compared, and how many pre-trained ones it takes."""
    count, total, rate = int(pool.accepted[index].sum()), len(pool.samples), float(pool.rates[index])
    needed = fewest(num_prompts)
    return (
        f"class {name!r}: {count} of {total} pre-trained samples were accepted (rate {rate:.2g}), expected about {needed} to "
        f"put ten on each side with the same prompts; it takes about {_rounded(needed / max(rate, 1e-300))} pre-trained samples"
    )


def _rounded(count: float) -> str:
    """Upwards to two digits: '73,000'; from a million on '4.1e+06'."""
    step = 10 ** max(0, math.floor(math.log10(count)) - 1)
    rounded = math.ceil(count / step) * step
    return f"{rounded:,}" if rounded < 1_000_000 else f"{rounded:.1e}"
