"""What of the gap no training removes, from pairs of pre-trained paths that share their noise up to a denoising step.

A policy starts from the pre-trained model's initial noise, although the target prefers some of it, and the last
`reference_steps` are the pre-trained model's. With the log tilt ℓ of a path (Σ_c γ_c / β log p̂_c) and the value
v(h) = log E_pre[e^ℓ | h], the best that is left to pay is

    initial noise     log E[e^v(x_T)] − E[v(x_T)],               over the pre-trained model's x_T
    reference steps   E_target[v(h) − E_pre[ℓ | h]],             h: before the last reference steps

Both need laws given h, of which a pair that parts at h has two samples. To second order in the spread, which is exact where
v or ℓ given h is Gaussian, they are ½ log(1 + Var e^v / Z²) and ½ E_target[Var(ℓ | h)]. The cost of fixed step variances is
the third structural part; it takes the curvature of v at every step, and is not estimated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import logsumexp

from ctrl_ray.evaluation.certificate import Estimate, tilted_mean


def initial_noise_part(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Nats that the initial noise costs, from the log tilts (m,) of paths and of other paths from the same x_T; m ≥ 2.

    The covariance of a pair's weights is the variance of Z(x_T).
    """
    log_z = logsumexp(np.concatenate([first, second])) - np.log(2 * len(first))
    products = np.expm1(first - log_z) * np.expm1(second - log_z)
    covariance = float(np.mean(products))
    error = float(np.std(products, ddof=1) / np.sqrt(len(products)))
    room = 1 + max(covariance, -0.5)  # a covariance is not negative; its estimate may be
    return Estimate(0.5 * float(np.log(room)), 0.5 * error / room)


def reference_steps_part(first: np.ndarray, second: np.ndarray) -> Estimate:
    """Nats that the last reference steps cost, from the log tilts (m,) of pairs that part before those steps; m ≥ 2.

    A pair's weight is that of its mean log tilt, which a Gaussian ℓ makes independent of the difference.
    """
    return tilted_mean((first - second) ** 2 / 4, (first + second) / 2)


def over_targets(
    part: Callable[[np.ndarray, np.ndarray], Estimate], first: np.ndarray, second: np.ndarray, shares: np.ndarray
) -> Estimate:
    """The mean of a part over targets in the shares (J,), from log tilts (J, m) each. All share the samples, so their errors
    add up."""
    found = [part(*rows) for rows in zip(first, second, strict=True)]
    values, errors = np.array(found).T
    return Estimate(float(shares @ values), float(shares @ errors))
