"""The numbers of an evaluation, in plain numpy: what was asked against what was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

_PIXELS_AT_A_TIME = 1 << 16


def accuracy(asked: np.ndarray, measured: np.ndarray) -> float:
    """Share of samples, both (N,) of class indices, whose measured class is the one asked for; NaN when N = 0."""
    return float(np.mean(asked == measured)) if len(asked) else float("nan")


def confusion_matrix(asked: np.ndarray, measured: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts (K, K) int64: row = class asked for, column = class measured. Inputs (N,) in [0, K)."""
    for name, classes in (("asked", asked), ("measured", measured)):
        if len(classes) and not (classes.min() >= 0 and classes.max() < num_classes):
            raise ValueError(f"{name} classes span {classes.min()}..{classes.max()}; expected 0..{num_classes - 1}")
    flat = np.bincount(asked.astype(np.int64) * num_classes + measured, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes)


def macro_f1(asked: np.ndarray, measured: np.ndarray, num_classes: int) -> float:
    """Mean over all K classes of F1 = 2 TP / (asked + measured).

    A class that was neither asked for nor measured counts as 0, so that a sampler cannot gain by leaving one out. (A
    class that was never asked for but does occur has TP = 0, hence 0 too.)
    """
    return macro_f1_of(confusion_matrix(asked, measured, num_classes))


def accuracy_of(confusion: np.ndarray) -> float:
    """Accuracy by a confusion matrix (K, K), such as the sum of several ranks'; NaN when it is empty."""
    total = confusion.sum()
    return float(np.trace(confusion) / total) if total else float("nan")


def macro_f1_of(confusion: np.ndarray) -> float:
    """`macro_f1` by a confusion matrix (K, K)."""
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float(np.mean(2 * np.diag(confusion) / np.maximum(total, 1)))


class Diversity(NamedTuple):
    """How different the images of one class are, averaged over classes."""

    mean: float
    """NaN when no class has two images."""
    standard_error: float
    """Of that mean, over redraws of the images."""


def within_class_diversity(images: np.ndarray, classes: np.ndarray) -> Diversity:
    """Mean over classes of the mean RMS pixel distance between two different images of that class.

    The distance of two images is sqrt(mean over H·W·3 of (a - b)^2) with pixels in [0, 1], so it lies in [0, 1]; all
    pairs are counted, none is sampled. A class with fewer than two images has no pair and is left out. The error of a
    mean over pairs is 2 / sqrt(n) times the standard deviation of an image's mean distance to the others (Hoeffding's
    U-statistics, 1948); classes are independent.

    Args:
        images: (N, H, W, 3) uint8.
        classes: (N,) any integers.
    """
    means, variances = [], []
    for members in (images[classes == value] for value in np.unique(classes)):
        count = len(members)
        if count < 2:
            continue
        distances = np.sqrt(np.maximum(_squared_distances(members), 0) / members[0].size) / 255
        to_others = distances.sum(axis=1) / (count - 1)
        means.append(to_others.mean())
        variances.append(4 * np.var(to_others, ddof=1) / count)
    if not means:
        return Diversity(float("nan"), float("nan"))
    return Diversity(float(np.mean(means)), float(np.sqrt(np.sum(variances)) / len(means)))


def _squared_distances(images: np.ndarray) -> np.ndarray:
    """(N, N) squared distances of uint8 images through their Gram matrix: integers below 2^53, so float64 is exact."""
    flat = images.reshape(len(images), -1)
    gram = np.zeros((len(images), len(images)))
    for start in range(0, flat.shape[1], _PIXELS_AT_A_TIME):
        block = flat[:, start : start + _PIXELS_AT_A_TIME].astype(np.float64)
        gram += block @ block.T
    squares = np.diag(gram)
    return squares[:, None] + squares[None, :] - 2 * gram


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share (E. B. Wilson, 1927); z = 1.96 is 95 %. (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share, squared = successes / trials, z * z / trials
    centre = (share + squared / 2) / (1 + squared)
    half = z * np.sqrt(share * (1 - share) / trials + squared / (4 * trials)) / (1 + squared)
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def mean_standard_error(values: np.ndarray) -> float:
    """Standard error of the mean of values (N,): sample standard deviation / sqrt(N); NaN when N < 2."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


def bootstrap_standard_error(
    statistic: Callable[[np.ndarray], float], num_samples: int, *, num_draws: int = 200, seed: int = 0
) -> float:
    """Standard deviation of `statistic(rows)` over `num_draws` redraws of `num_samples` row indices with replacement."""
    if num_samples < 2:
        return float("nan")
    rng = np.random.default_rng(seed)
    draws = [statistic(rng.integers(num_samples, size=num_samples)) for _ in range(num_draws)]
    return float(np.std(draws, ddof=1))


class PairedDifference(NamedTuple):
    """How much a per-sample quantity changed between two runs over the same samples."""

    mean: float
    """mean(after - before)."""
    standard_error: float
    """Of that mean, from the differences themselves: pairs share their noise, so it is smaller than unpaired."""
    num_pairs: int


def paired_difference(before: np.ndarray, after: np.ndarray) -> PairedDifference:
    """Difference after - before of paired values, both (N,); booleans count as 0 and 1."""
    if before.shape != after.shape:
        raise ValueError(f"pairs need as many values before {before.shape} as after {after.shape}")
    differences = after.astype(np.float64) - before.astype(np.float64)
    mean = float(differences.mean()) if len(differences) else float("nan")
    return PairedDifference(mean, mean_standard_error(differences), len(differences))
