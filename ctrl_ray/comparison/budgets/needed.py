"""How many labels another method needs for the same distance to the target."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Needed:
    """A number of labelled images, or a bound on it where the budgets do not reach that far."""

    images: float
    bound: str
    """'=': interpolated; '<=': the smallest budget is enough; '>': the largest one is not."""


def images_needed(distance: float, budgets: Sequence[int], distances: Sequence[float]) -> Needed:
    """Labelled images at which a curve first comes as near as `distance`.

    Between two budgets the logarithm of the distance is linear in that of the budget; a budget that is farther than a smaller
    one (noise) counts as that one. Distances are positive.
    """
    curve = np.minimum.accumulate(np.asarray(distances, dtype=np.float64))
    if curve[0] <= distance:
        return Needed(float(budgets[0]), "<=")
    if curve[-1] > distance:
        return Needed(float(budgets[-1]), ">")
    after = int(np.argmax(curve <= distance))
    x, y = np.log(budgets), np.log(curve)
    share = (y[after - 1] - math.log(distance)) / (y[after - 1] - y[after])
    return Needed(float(np.exp(x[after - 1] + share * (x[after] - x[after - 1]))), "=")


def label_ratios(
    budgets: Sequence[int], ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """Of each budget how many times its labels the other method needs for our distance.

    Args:
        budgets: n, ascending.
        ours: (n, seeds) distances to the target.
        theirs: The same of the other method.

    Returns:
        'budget'; 'ratio', the median over seeds, with 'low' and 'high', the extremes; 'bounds' of the seeds, as in `Needed`: a
        ratio with '>' is at least that large.
    """
    rows = []
    for budget, distances in zip(budgets, ours, strict=True):
        found = [
            images_needed(distance, budgets, curve) for distance, curve in zip(distances, zip(*theirs), strict=True)
        ]
        ratios = sorted(one.images / budget for one in found)
        rows.append(
            {
                "budget": budget,
                "ratio": float(np.median(ratios)),
                "low": ratios[0],
                "high": ratios[-1],
                "bounds": [one.bound for one in found],
            }
        )
    return rows
