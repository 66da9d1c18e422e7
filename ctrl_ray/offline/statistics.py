"""What the values of a control look like, and class borders that would split them evenly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctrl_ray.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnSummary:
    """The distribution of one column of numbers."""

    count: int
    minimum: float
    quartiles: tuple[float, float, float]
    maximum: float
    class_counts: dict[int, int]
    """Rows of each label, when the column can be one of integer labels (whole numbers from 0, at most 100 of them);
    otherwise empty."""


def summarise(values: np.ndarray) -> ColumnSummary:
    """Summary of values (N,), N >= 1, integers or finite numbers; integer dtype marks possible labels."""
    first, median, third = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
    counts: dict[int, int] = {}
    if np.issubdtype(values.dtype, np.integer) and values.min() >= 0 and values.max() < 100:
        counts = {label: int(count) for label, count in enumerate(np.bincount(values))}
    return ColumnSummary(
        count=len(values),
        minimum=float(values.min()),
        quartiles=(first, median, third),
        maximum=float(values.max()),
        class_counts=counts,
    )


def equal_share_thresholds(values: np.ndarray, num_classes: int) -> tuple[float, ...]:
    """Borders that give `num_classes` classes (class i is [t[i-1], t[i])) shares of the values as equal as can be.

    No class is empty: where many values are equal, or there are few of them, fewer borders come back, and none at all for
    one distinct value. Borders are rounded to six significant digits where that leaves the classes as they are.
    """
    if num_classes < 2:
        raise ConfigError(f"classes is {num_classes}; expected at least 2")
    if len(values) == 0:
        raise DataError("there is no value to take thresholds from; expected at least one")
    shares = np.arange(1, num_classes) / num_classes
    kept: list[float] = []
    for border in np.unique(np.quantile(values, shares)).tolist():
        below = kept[-1] if kept else -np.inf
        if np.any((values >= below) & (values < border)):
            kept.append(border)
    rounded = tuple(float(f"{border:.6g}") for border in kept)
    same = list(rounded) == sorted(set(rounded)) and class_shares(values, rounded) == class_shares(values, tuple(kept))
    return rounded if same else tuple(kept)


def class_shares(values: np.ndarray, thresholds: tuple[float, ...]) -> tuple[float, ...]:
    """Share of the values in each class that the thresholds make; they add up to 1."""
    classes = np.searchsorted(np.asarray(thresholds), values, side="right")
    return tuple(float(share) for share in np.bincount(classes, minlength=len(thresholds) + 1) / len(values))
