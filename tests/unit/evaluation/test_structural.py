"""The structural parts of the gap, against exact problems and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ctrl_ray.evaluation.certificate import Estimate
from ctrl_ray.evaluation.structural import Part, initial_noise_part, over_targets, reference_steps_part
from ctrl_ray.exact.chain import reference_chain
from ctrl_ray.exact.problems import Problem
from ctrl_ray.exact.suite import gaussian, logistic

PAIRS = 10_000


def _part(part: Part, first: np.ndarray, second: np.ndarray) -> Estimate:
    """Of one target."""
    return over_targets(part, first[None], second[None], np.ones(1))


def _pair(problem: Problem, shared_steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Log tilts of pairs of pre-trained paths that part after so many shared steps."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, PAIRS))
    x[1] = x[0]
    for k, step in enumerate(reference_chain(problem.mixture, problem.sampler)):
        z = rng.standard_normal((2, PAIRS))
        if k < shared_steps:
            z[1] = z[0]
        x = step.mean(x[..., None])[..., 0] + step.std * z
    strength = problem.guidance_strengths[0] / problem.kl_coef
    tilts = strength * problem.rewards[0].log_prob(x)
    return tilts[0], tilts[1]


@pytest.mark.parametrize(
    ("problem", "expected"),
    [(gaussian().problem, 0.0089), (logistic().problem, 0.0072), (logistic(4.0).problem, 0.0138)],
    ids=["T1", "T4", "T4, γ 4"],
)
def test_the_initial_noise_costs_what_was_published(problem: Problem, expected: float) -> None:
    part = _part(initial_noise_part, *_pair(problem, 0))
    assert part.standard_error < (0.05 if expected == 0.0089 else 0.006)  # T1's weights have the longest tail
    assert part.value == pytest.approx(expected, abs=3 * part.standard_error + 0.001)  # to second order


def test_reference_steps_by_the_closed_form() -> None:
    """ℓ = a (h + σ z), h ~ N(0, 1): v = a h + a² σ² / 2, so that the cost is a² σ² / 2 whatever the tilt of h."""
    rng = np.random.default_rng(0)
    a, sigma = 0.8, 0.7
    h = rng.standard_normal(PAIRS)
    first, second = (a * (h + sigma * rng.standard_normal(PAIRS)) for _ in range(2))
    part = _part(reference_steps_part, first, second)
    assert part.standard_error < 0.02
    assert part.value == pytest.approx(a**2 * sigma**2 / 2, abs=3 * part.standard_error)
    assert _part(reference_steps_part, first, first) == pytest.approx((0, 0))


def test_an_initial_noise_that_tells_everything_or_nothing() -> None:
    """Z(x_T) = e^{s x}: log E − E log is s² / 2. With independent halves there is nothing to pay."""
    rng = np.random.default_rng(0)
    x, y = 0.5 * rng.standard_normal((2, PAIRS))
    told = _part(initial_noise_part, x, x)
    assert told.value == pytest.approx(0.125, abs=3 * told.standard_error) and told.standard_error < 0.02
    nothing = _part(initial_noise_part, x, y)
    assert nothing.value == pytest.approx(0, abs=3 * nothing.standard_error)


@pytest.mark.parametrize("part", [initial_noise_part, reference_steps_part])
def test_targets_are_averaged_in_their_shares(part: Part) -> None:
    """The error of targets that need the same pairs is that of one; of others, what repeats show."""
    rng = np.random.default_rng(0)
    shares = np.array([0.5, 0.25, 0.25])
    repeats = rng.normal(scale=0.3, size=(200, 2, 3, 512)) + rng.normal(scale=0.3, size=(200, 1, 3, 512))
    means = [over_targets(part, first, second, shares) for first, second in repeats]
    first, second = repeats[0]
    each = [_part(part, *rows) for rows in zip(first, second, strict=True)]
    assert means[0].value == pytest.approx(sum(s * e.value for s, e in zip(shares, each, strict=True)))
    spread = np.std([mean.value for mean in means])
    assert np.mean([mean.standard_error for mean in means]) == pytest.approx(spread, rel=0.2)
    one, same = _part(part, first[0], second[0]), over_targets(part, first[[0] * 3], second[[0] * 3], shares)
    assert same == pytest.approx(one)
