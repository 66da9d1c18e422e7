"""What of the gap no training removes, from pairs of pre-trained paths that share their noise up to a denoising step.

A policy starts from the pre-trained model's initial noise, although the target prefers some of it, and the last
`reference_steps` are the pre-trained model's. With the log tilt ℓ of a path (Σ_c γ_c / β log p̂_c) and the value
v(h) = log E_pre[e^ℓ | h], the best that is left to pay is

    initial noise     log E[e^v(x_T)] − E[v(x_T)],               over the pre-trained model's x_T
    reference steps   E_target[v(h) − E_pre[ℓ | h]],             h: before the last reference steps

Both need laws given h, of which a pair that parts at h has two samples. To second order in the spread, which is exact where
v or ℓ given h is Gaussian, they are ½ log(1 + Var e^v / Z²) and ½ E_target[Var(ℓ | h)]. The cost of fixed step variances is
the third structural part; it takes the curvature of v at every step, for which there is `gradients.variance_cost`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import logsumexp

from ctrl_ray.evaluation.certificate import Estimate

Part = Callable[[np.ndarray, np.ndarray], tuple[float, np.ndarray]]
"""Log tilts (m,) of the first and of the second halves of m ≥ 2 pairs to a part in nats, and what each pair adds to its error
(m,): the root of the sum of their squares is the standard error (delta method)."""


def initial_noise_part(first: np.ndarray, second: np.ndarray) -> tuple[float, np.ndarray]:
    """What the initial noise costs, from paths and other paths from the same x_T; a `Part`.

    The covariance of a pair's weights is the variance of Z(x_T).
    """
    count = len(first)
    log_z = logsumexp(np.concatenate([first, second])) - np.log(2 * count)
    products = np.expm1(first - log_z) * np.expm1(second - log_z)
    covariance = float(np.mean(products))
    room = 1 + max(covariance, -0.5)  # a covariance is not negative; its estimate may be
    return 0.5 * float(np.log(room)), 0.5 * (products - covariance) / room / np.sqrt(count * (count - 1))


def reference_steps_part(first: np.ndarray, second: np.ndarray) -> tuple[float, np.ndarray]:
    """What the last reference steps cost, from pairs that part before those steps; a `Part`.

    A pair's weight is that of its mean log tilt, which a Gaussian ℓ makes independent of the difference.
    """
    means = (first + second) / 2
    shares, values = np.exp(means - logsumexp(means)), (first - second) ** 2 / 4
    value = float(shares @ values)
    return value, shares * (values - value)


def over_targets(part: Part, first: np.ndarray, second: np.ndarray, shares: np.ndarray) -> Estimate:
    """The mean of a part over targets in the shares (J,), which have the pairs in common; log tilts (J, m) each."""
    found = [part(*rows) for rows in zip(first, second, strict=True)]
    values, errors = np.array([value for value, _ in found]), np.array([error for _, error in found])
    return Estimate(float(shares @ values), float(np.linalg.norm(shares @ errors)))
