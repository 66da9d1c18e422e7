"""The weights of candidates, and how many of them the pre-trained model draws.

A group of K candidates of one image holds a share a of pre-trained paths, the others are the policy's. Every path, of either
kind, has the weight of the target over that mixture (the balance heuristic of Veach & Guibas 1995),

    log w = ℓ − log(a + (1 − a) e^r),   ℓ = Σ_c exponent_c · log p̂_c(y_c|x_0),   r = log (policy / pre-trained) of the path,

so that w ≤ e^ℓ / a, however far the policy is from the target. One of the group is drawn in proportion to w: as K grows its
law tends to the target (sampling-importance resampling, Rubin 1987), with a bias of order 1/K. Never take several from one
group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp

from ctrl_ray.diffusion.noise import draw_uniform
from ctrl_ray.evaluation.certificate import Paths, mixture_log_weights, with_null

SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)
"""Shares of pre-trained paths that `choose_share` looks at. About half of the candidates or more stay the policy's: they are
of the class that is asked for where no pre-trained one is, which an effective sample size does not know."""
DEFAULT_SHARE = 1 / 2
"""For an adapter that does not say its own: no weight is above twice what it would be at the best share."""


class CandidateShare(NamedTuple):
    """How the candidates of an adapter are best divided."""

    share: float
    """Of pre-trained paths, in (0, 1)."""
    efficiency: float
    """Effective sample size of a large group as a share of its candidates, in (0, 1]."""


def num_pre_trained(num_candidates: int, share: float) -> int:
    """How many of a group's K ≥ 2 candidates the pre-trained model draws: one at least, and not all."""
    assert num_candidates >= 2
    return min(max(1, round(share * num_candidates)), num_candidates - 1)


def log_tilts(
    class_log_probs: Mapping[str, np.ndarray], labels: np.ndarray, exponents: Mapping[str, float]
) -> np.ndarray:
    """ℓ of samples, (n,) float64.

    class_log_probs: (n, K_c) of each control that is asked for; labels: (n, C), K_c or a control that is not in
    class_log_probs asks for nothing; exponents: of every control, in the order of the columns.
    """
    total = np.zeros(len(labels))
    for column, (name, exponent) in enumerate(exponents.items()):
        if name in class_log_probs:
            total += exponent * with_null(class_log_probs[name])[np.arange(len(labels)), labels[:, column]]
    return total


def candidate_log_weights(tilts: np.ndarray, log_ratios: np.ndarray | None, share: float) -> np.ndarray:
    """log w, like the tilts: of the mixture, or (log_ratios None: all candidates are pre-trained) the tilts themselves."""
    return tilts if log_ratios is None else mixture_log_weights(Paths(tilts, log_ratios), share)


def selection_noise(seed: int, candidate: int) -> float:
    """A standard Gumbel number, keyed by the image's seed and the candidate: the candidate with the largest log w + number
    is chosen with probability w / Σ w (Gumbel 1954)."""
    uniform = draw_uniform(seed, 0, candidate, "choice")
    return -math.log(-math.log(uniform)) if uniform > 0 else -math.inf


def predicted_efficiency(policy: Paths, pre_trained: Paths, share: float) -> float:
    """(E w)² / E w² under the mixture, from paths of both kinds with their log-ratios.

    That is the effective sample size of a large group as a share of its candidates. Tilts of different targets must be
    relative: divided by the Z of their own.
    """
    parts = [
        (mixture_log_weights(paths, share), math.log(weight / len(paths)))
        for paths, weight in ((pre_trained, share), (policy, 1 - share))
    ]
    first, second = (logsumexp([logsumexp(power * logs) + scale for logs, scale in parts]) for power in (1, 2))
    return float(np.exp(2 * first - second))


def choose_share(policy: Paths, pre_trained: Paths) -> CandidateShare:
    """The share of SHARES with the largest predicted efficiency; the smallest of equals."""
    return max(
        (CandidateShare(share, predicted_efficiency(policy, pre_trained, share)) for share in SHARES),
        key=lambda choice: choice.efficiency,
    )
