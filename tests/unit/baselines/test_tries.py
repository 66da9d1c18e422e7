"""Best of N and rejection: laws that are known, on two modes with a logistic reward."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from ctrl_ray.baselines.tries import BestOfN, Rejection
from ctrl_ray.exact.grid import Grid, solve_on_grid
from ctrl_ray.exact.suite import logistic
from ctrl_ray.gradients.rollout import rollout
from tests.unit.baselines.closed_forms import Bench

COUNT = 2000
LARGEST = 1.63 / COUNT**0.5
"""Of the Kolmogorov–Smirnov distance, in one case of a hundred."""


def _distance(x: torch.Tensor, grid: Grid, cumulative: np.ndarray) -> float:
    return float(kstest(x.double().numpy(), lambda value: np.interp(value, grid.edges[1:], cumulative)).statistic)


@pytest.mark.parametrize("exponent", [1.0, 4.0])
def test_rejection_is_exact(exponent: float) -> None:
    bench = Bench.of(logistic(exponent, num_steps=10))
    solution = solve_on_grid(bench.case.problem, num_bins=600)
    x = bench.sample(Rejection(exponents=(exponent,)), COUNT).clean_latents[:, 0]
    assert _distance(x, solution.grid, solution.tilt.law.cumsum()) < LARGEST
    if exponent == 4:  # and not of another exponent
        other = solve_on_grid(logistic(1.0, num_steps=10).problem, num_bins=600)
        assert _distance(x, other.grid, other.tilt.law.cumsum()) > 3 * LARGEST


@pytest.mark.parametrize("count", [2, 5])
def test_best_of_n_is_the_largest_of_n(count: int) -> None:
    """The reward rises with x, so the law is that of the largest of N samples."""
    bench = Bench.of(logistic(num_steps=10))
    solution = solve_on_grid(bench.case.problem, num_bins=600)
    x = bench.sample(BestOfN(exponents=(1.0,), num_particles=count), COUNT).clean_latents[:, 0]
    assert _distance(x, solution.grid, solution.base.law.cumsum() ** count) < LARGEST
    assert _distance(x, solution.grid, solution.base.law.cumsum() ** (count + 1)) > LARGEST


def test_the_first_try_is_plain_sampling() -> None:
    bench = Bench.of(logistic(num_steps=10))
    plain = rollout(bench.policy, bench.learner.kernel, bench.inputs(6), bench.noise(6), reference=True).latents
    assert torch.equal(bench.sample(BestOfN(exponents=(1.0,), num_particles=1), 6).latents, plain)
    assert torch.equal(bench.sample(Rejection(exponents=(0.0,)), 6).latents, plain)  # accepts everything


@pytest.mark.parametrize("sampler", [BestOfN(exponents=(1.0,), num_particles=4), Rejection(exponents=(4.0,))])
def test_an_image_knows_nothing_of_the_others(sampler: Any) -> None:
    bench = Bench.of(logistic(num_steps=10))
    many = bench.sample(sampler, 6).latents
    one: Any = bench.sample(sampler, 1, lambda k: bench.noise(6)(k)[4:5]).latents
    torch.testing.assert_close(one[:, 0], many[:, 4])


def test_an_image_that_no_try_is_accepted_of_is_told() -> None:
    """At an exponent of 400 nothing is accepted; of three tries the one with the largest weight is kept then."""
    bench = Bench.of(logistic(num_steps=10))
    hard = Rejection(exponents=(400.0,), max_tries=3)
    with pytest.warns(UserWarning, match=r"accepted none of 3 tries for \d of 5 images"):
        found = bench.sample(hard, 5).clean_latents
    best = bench.sample(BestOfN(exponents=(1.0,), num_particles=3), 5).clean_latents
    assert (found == best).float().mean() > 0.5
    with pytest.warns(UserWarning):
        once = bench.sample(dataclasses.replace(hard, max_tries=1), 5).latents
    assert torch.equal(once, bench.sample(Rejection(exponents=(0.0,)), 5).latents)
