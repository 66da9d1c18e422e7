"""Particle filters estimate Z without bias at any N, and their law tends to the target; defects of public versions show."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrl_ray.baselines import dps, particles
from ctrl_ray.baselines.dps import DPS
from ctrl_ray.baselines.particles import ParticleFilter, PotentialKind
from ctrl_ray.baselines.smc import SMC, TDS, FKSteering
from ctrl_ray.exact.gaussian import solve_gaussian
from ctrl_ray.exact.grid import solve_on_grid
from ctrl_ray.exact.suite import Case, logistic
from ctrl_ray.gradients.rollout import rollout
from tests.unit.baselines.closed_forms import Bench, affine_law, guided_chain, law_of, wide_gaussian
from tests.unit.baselines.test_guided import _dps

REPEATS = 600
Make = Callable[[int], ParticleFilter]


def _tds(count: int) -> ParticleFilter:
    return TDS(exponents=(1.0,), num_particles=count)


def _smc(count: int) -> ParticleFilter:
    return SMC(exponents=(1.0,), num_particles=count)


def _fk(potential: PotentialKind, every: int = 3) -> Make:
    return lambda count: FKSteering(exponents=(1.0,), num_particles=count, every=every, potential=potential)


def _z_error(bench: Bench, sampler: ParticleFilter) -> tuple[float, float, np.ndarray]:
    """(mean of Ẑ / Z − 1 over the repeats, its standard error, estimates of the target's mean (REPEATS,))."""
    z = math.exp(solve_on_grid(bench.case.problem, num_bins=600).log_z)
    found = bench.particles(sampler, REPEATS)
    ratios = (found.log_z.exp() / z).numpy()
    means = (found.log_weights.softmax(1) * found.latents[-1, ..., 0].double()).sum(1).numpy()
    return float(ratios.mean() - 1), float(ratios.std(ddof=1) / REPEATS**0.5), means


def check_unbiased(bench: Bench, sampler: ParticleFilter) -> None:
    """Within three standard errors, which are small enough to tell a few per cent."""
    error, standard_error, _ = _z_error(bench, sampler)
    assert standard_error < 0.03
    assert abs(error) < 3 * standard_error


@pytest.mark.parametrize("make", [_tds, _smc, _fk("difference"), _fk("max")])
@pytest.mark.parametrize("case", [wide_gaussian(20), logistic(num_steps=20)], ids=["gaussian", "logistic"])
def test_z_is_estimated_without_bias(case: Case, make: Make) -> None:
    check_unbiased(Bench.of(case), make(16))


def test_sums_of_rewards_have_the_same_target() -> None:
    """Two potentials alone: their product is divided out at the end, which many of them make a lottery of."""
    check_unbiased(Bench.of(logistic(num_steps=20)), _fk("add", every=7)(16))


@pytest.mark.full
@pytest.mark.parametrize("make", [_tds, _smc])
@pytest.mark.parametrize("case", [wide_gaussian(50), logistic()], ids=["gaussian", "logistic"])
def test_at_50_steps_z_has_no_bias_and_the_mean_s_error_falls(case: Case, make: Make) -> None:
    bench, errors = Bench.of(case), []
    target = solve_on_grid(case.problem, num_bins=600).tilt.mean
    for count in (16, 64, 256):
        error, standard_error, means = _z_error(bench, make(count))
        errors.append(float(np.sqrt(np.mean((means - target) ** 2))))
        print(
            f"{bench.case.title} {make(1).method} N {count}: Ẑ/Z {1 + error:.4f} ± {standard_error:.4f}, "
            f"mean {means.mean() - target:+.4f}, root mean square error {errors[-1]:.4f}"
        )
        assert abs(error) < 3 * standard_error
    assert errors[0] > 1.6 * errors[1] > 2.56 * errors[2]


def check_law_of_the_drawn(bench: Bench) -> None:
    """What a filter returns is a draw in proportion to w: its mean is that of the weighted particles."""
    sampler = _smc(8)
    drawn = bench.sample(sampler, 2500).clean_latents[:, 0].double()
    found = bench.particles(sampler, 2500)
    weighted = (found.log_weights.softmax(1) * found.latents[-1, ..., 0].double()).sum(1)
    difference = drawn - weighted
    assert abs(float(difference.mean())) < 3.5 * float(difference.std()) / 2500**0.5


def test_the_drawn_particle_has_the_weighted_law() -> None:
    check_law_of_the_drawn(Bench.of(logistic(num_steps=10)))


def test_the_law_tends_to_the_target() -> None:
    bench = Bench.of(logistic(num_steps=10))
    solution = solve_on_grid(bench.case.problem, num_bins=600)
    edges = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5])
    tilt = np.bincount(np.digitize(solution.grid.centres, edges), solution.tilt.law, minlength=7)
    x = bench.sample(_tds(64), 1500).clean_latents[:, 0].numpy()
    reached = np.bincount(np.digitize(x, edges), minlength=7) / 1500
    assert np.all(np.abs(reached - tilt) < 4 * np.sqrt(tilt * (1 - tilt) / 1500) + 0.01)


def test_one_particle_is_plain_sampling() -> None:
    bench = Bench.of(logistic(num_steps=10))
    plain = rollout(bench.policy, bench.learner.kernel, bench.inputs(6), bench.noise(6), reference=True)
    for sampler in (_smc(1), _fk("add")(1), TDS(exponents=(1.0,), num_particles=1, scale=0.0)):
        torch.testing.assert_close(bench.sample(sampler, 6).latents, plain.latents)
    guided = bench.sample(DPS(exponents=(1.0,)), 6)
    torch.testing.assert_close(bench.sample(_tds(1), 6).latents, guided.latents, atol=1e-5, rtol=1e-5)


def test_an_image_knows_nothing_of_the_others() -> None:
    bench = Bench.of(logistic(num_steps=10))
    for make in (_tds, _smc, _fk("max")):
        many = bench.sample(make(8), 5).latents
        one: Any = bench.sample(make(8), 1, lambda k: bench.noise(5)(k)[3:4]).latents
        torch.testing.assert_close(one[:, 0], many[:, 3], atol=1e-5, rtol=1e-5)


def test_a_path_is_one_path() -> None:
    """After resampling: each step of the path that comes back is one of the chain's, from where the path was."""
    bench = Bench.of(logistic(num_steps=10))
    kernel, count = bench.learner.kernel, 32
    latents = bench.sample(_smc(64), count).latents
    bridged = []
    for k in range(kernel.num_steps):
        step = kernel.step(k, latents[k], bench.policy(latents[k], kernel.time(k), bench.inputs(count), reference=True))
        bridged.append((latents[k + 1] - step.mean) / step.std)
    z = torch.stack(bridged)
    assert float(z.abs().max()) < 5  # the noise of another particle's step would be tens of deviations off


# What public versions get wrong, put in by hand.


def test_a_reward_averaged_over_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The push is then 1 / B of what it should be, and the affine recursion says so."""
    bench = Bench.of(wide_gaussian(20))
    right = dps.log_tilt_and_gradient

    def averaged(*args: Any) -> tuple[Tensor, Tensor]:
        tilts, gradient = right(*args)
        return tilts, gradient / len(gradient)

    def miss() -> float:
        expected = law_of(guided_chain(20, _dps(1.0)))[:2]
        return max(abs(a - b) for a, b in zip(affine_law(bench, DPS(exponents=(1.0,))), expected, strict=True))

    assert miss() < 2e-5
    monkeypatch.setattr(dps, "log_tilt_and_gradient", averaged)
    assert miss() > 0.1


def test_the_largest_weight_in_place_of_a_draw_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench.of(logistic(num_steps=10))
    monkeypatch.setattr(particles, "drawn", lambda log_weights, *_: log_weights.argmax(1).tolist())
    with pytest.raises(AssertionError):
        check_law_of_the_drawn(bench)


@pytest.mark.parametrize("potential", ["max", "add"])
def test_potentials_that_are_not_divided_out_are_caught(
    potential: PotentialKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench.of(logistic(num_steps=20))

    class NeverDividedOut(particles._Potentials):
        @property
        def product(self) -> Tensor:
            return torch.zeros_like(self._seen)

        @product.setter
        def product(self, value: Tensor) -> None:
            pass

    monkeypatch.setattr(particles, "_Potentials", NeverDividedOut)
    with pytest.raises(AssertionError):
        check_unbiased(bench, _fk(potential, every=7)(16))


def test_weights_that_are_dropped_when_resampling_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """log w set back to 0 without a resampling: the filter forgets what it has weighed so far."""
    bench = Bench.of(logistic(num_steps=20))
    right = particles._resampled

    def dropped(log_weights: Tensor, *args: Any) -> Any:
        parents, gained = right(log_weights, *args)
        return parents, gained._replace(log_weights=torch.zeros_like(log_weights))

    monkeypatch.setattr(particles, "_resampled", dropped)
    with pytest.raises(AssertionError):
        check_unbiased(bench, _smc(16))


def test_t1_s_mean_is_known_in_closed_form() -> None:
    """The grid that the others are judged by and the Riccati recursion agree on this reward."""
    case = wide_gaussian(20)
    assert solve_on_grid(case.problem).tilt.mean == pytest.approx(solve_gaussian(case.problem).tilt.mean, abs=1e-3)
