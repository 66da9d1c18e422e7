"""The exact law of one of K independent candidates that is drawn in proportion to its weight, by an integral; no group is
ever formed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_LOG_TIMES = np.arange(-16.0, 9.0, 0.05)


class Kind(NamedTuple):
    """So many candidates of a group that are drawn alike."""

    count: int
    probabilities: np.ndarray
    """(n,) of the atoms that approximate their law (a grid, or equal ones of a sample)."""
    weights: np.ndarray
    """(n,) of each atom."""
    bins: np.ndarray
    """(n,) int: where each atom is counted."""


def law_of_the_chosen(kinds: Sequence[Kind], num_bins: int) -> np.ndarray:
    """(num_bins,): with 1 / S = ∫ e^{−tS} dt and independent candidates, an atom of kind k is chosen with the rate

    count_k p w ∫ e^{−t w} φ_k(t)^{count_k − 1} Π_{others} φ_l(t)^{count_l} dt,   φ(t) = E e^{−t w}.
    """
    times = np.exp(_LOG_TIMES)
    step = _LOG_TIMES[1] - _LOG_TIMES[0]
    with np.errstate(divide="ignore"):
        log_phis = [np.log([float(kind.probabilities @ np.exp(-t * kind.weights)) for t in times]) for kind in kinds]
    total = np.zeros(num_bins)
    for index, kind in enumerate(kinds):
        log_rest = sum(
            (other.count - (place == index)) * log_phi
            for place, (other, log_phi) in enumerate(zip(kinds, log_phis, strict=True))
        )
        rest = np.exp(np.asarray(log_rest)) * times * step
        rates = np.zeros(len(kind.weights))
        for t, factor in zip(times, rest, strict=True):
            rates += factor * np.exp(-t * kind.weights)
        total += np.bincount(kind.bins, kind.count * kind.probabilities * kind.weights * rates, minlength=num_bins)
    return total
