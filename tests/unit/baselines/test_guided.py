"""Guidance at sampling time misses the target by amounts that an affine recursion predicts, and its paths have a density."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ctrl_ray.baselines.dps import DPS
from ctrl_ray.baselines.guided import GuidedSampler
from ctrl_ray.baselines.mpgd import MPGD
from ctrl_ray.baselines.tfg import TFG
from ctrl_ray.exact.gaussian import solve_gaussian
from ctrl_ray.exact.grid import solve_on_grid
from ctrl_ray.exact.suite import logistic
from ctrl_ray.gradients.rollout import rollout
from tests.unit.baselines.closed_forms import Bench, Guide, affine_law, guided_chain, law_of, wide_gaussian

TARGET, STD = 2.0, 1.5


def _dps(scale: float, exponent: float = 1.0) -> Guide:
    """The mean moves by scale (1 − ᾱ/ᾱ') / √(ᾱ/ᾱ') ∇_x ℓ(√ᾱ x), as the twisted diffusion sampler writes it."""

    def guide(alpha: float, following: float, slope: float, _: float) -> tuple[float, float]:
        gain = scale * exponent * (1 - alpha / following) / math.sqrt(alpha / following) * slope / STD**2
        return -gain * slope, gain * TARGET

    return guide


def _mpgd(scale: float, first: int = 0, last: int = 99) -> Guide:
    def guide(alpha: float, following: float, slope: float, k: float) -> tuple[float, float]:
        gain = math.sqrt(following) * scale / STD**2 if first <= k < last else 0.0
        return -gain * slope, gain * TARGET

    return guide


def _tfg(scale: float, mean_scale: float, iterations: int, num_steps: int) -> Guide:
    """Without smoothing: x̂_0 moves towards the target by a factor each time, x by the gradient through x̂_0."""
    ratios = [g[0] / g[1] for g in _alphas(num_steps)]

    def guide(alpha: float, following: float, slope: float, _: float) -> tuple[float, float]:
        relative = alpha / following * len(ratios) / sum(ratios)
        left = (1 - mean_scale * relative / STD**2) ** iterations  # x̂_0 + Δ − target = left (x̂_0 − target)
        moved = math.sqrt(following) * (1 - left)
        through = scale * relative * math.sqrt(following / alpha) * slope / STD**2
        return -(moved + through) * slope, (moved + through) * TARGET

    return guide


def _alphas(num_steps: int) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = []
    guided_chain(num_steps, lambda alpha, following, *_: (found.append((alpha, following)), (0.0, 0.0))[1])
    return found


CASES: list[tuple[GuidedSampler, Guide]] = [
    (DPS(exponents=(1.0,)), _dps(1.0)),
    (DPS(exponents=(2.0,), scale=1.5), _dps(1.5, 2.0)),
    (MPGD(exponents=(1.0,), scale=0.2), _mpgd(0.2)),
    (MPGD(exponents=(1.0,), scale=0.2, window=(0.3, 0.7)), _mpgd(0.2, 6, 14)),
    (TFG(exponents=(1.0,), scale=0.3, mean_scale=0.1, smoothing=0.0, num_iterations=3), _tfg(0.3, 0.1, 3, 20)),
]


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench.of(wide_gaussian(20))


@pytest.mark.parametrize("sampler, guide", CASES, ids=lambda value: getattr(value, "method", ""))
def test_the_law_is_the_affine_recursion_s(bench: Bench, sampler: GuidedSampler, guide: Guide) -> None:
    mean, std, kl = law_of(guided_chain(20, guide))
    assert affine_law(bench, sampler) == pytest.approx((mean, std), abs=2e-5)
    found = bench.sample(sampler, 4000)
    assert found.kl_per_step is not None and found.log_ratio is not None
    per_path = found.kl_per_step.double().sum(1)
    assert float(per_path.mean()) == pytest.approx(kl, abs=4 * float(per_path.std()) / 4000**0.5)
    ratio = found.log_ratio
    assert float(ratio.mean()) == pytest.approx(kl, abs=4 * float(ratio.std()) / 4000**0.5)


def test_dps_and_mpgd_miss_the_tilt(bench: Bench) -> None:
    """By more than what fixed step variances cost any sampler of this kind."""
    tilt = solve_gaussian(bench.case.problem)
    best = abs(tilt.optimum.mean - tilt.tilt.mean)
    missed = {type(s).__name__: abs(affine_law(bench, s)[0] - tilt.tilt.mean) for s, _ in (CASES[0], CASES[2])}
    assert best < 5e-3
    assert min(missed.values()) > 10 * best, missed


@pytest.mark.parametrize(
    "sampler",
    [
        DPS(exponents=(1.0,), scale=0.5),
        MPGD(exponents=(1.0,), scale=0.02),
        TFG(exponents=(1.0,), scale=0.01, mean_scale=0.004, num_smoothed=2, num_iterations=2, smoothing=0.3),
    ],
    ids=lambda sampler: sampler.method,
)
def test_weights_of_the_paths_have_mean_z(sampler: GuidedSampler) -> None:
    """E[e^(ℓ − log-ratio)] = Z: the certificate of a guided sampler is exact, whatever it samples."""
    bench = Bench.of(logistic(num_steps=10))
    paths = bench.sample(sampler, 6000)
    assert paths.log_ratio is not None
    x = paths.clean_latents[:, 0].double()
    weights = (torch.nn.functional.logsigmoid(x) - paths.log_ratio).exp()
    z = math.exp(solve_on_grid(bench.case.problem, num_bins=600).log_z)
    assert float(weights.mean()) == pytest.approx(z, abs=3.5 * float(weights.std()) / 6000**0.5)
    assert float(weights.std()) / 6000**0.5 < 0.02 * z


def test_a_sampler_that_does_not_guide_is_the_plain_one(bench: Bench) -> None:
    plain = rollout(bench.policy, bench.learner.kernel, bench.inputs(5), bench.noise(5), reference=True)
    for sampler in (DPS(exponents=(1.0,), scale=0.0), MPGD(exponents=(1.0,), scale=0.0), DPS(exponents=(0.0,))):
        found = bench.sample(sampler, 5)
        torch.testing.assert_close(found.latents, plain.latents, atol=1e-6, rtol=1e-6)


def test_an_image_knows_nothing_of_the_others(bench: Bench) -> None:
    for sampler, _ in CASES:
        many = bench.sample(sampler, 7).latents
        one: Any = bench.sample(sampler, 1, lambda k: bench.noise(7)(k)[4:5]).latents
        torch.testing.assert_close(one[:, 0], many[:, 4], atol=1e-5, rtol=1e-5)


def test_the_window_and_the_last_reference_steps_are_unguided() -> None:
    bench = Bench.of(wide_gaussian(10))
    bench.learner.kernel.reference_steps = 2  # type: ignore[attr-defined]
    kl = bench.sample(DPS(exponents=(1.0,), window=(0.3, 1.0)), 3).kl_per_step
    assert kl is not None
    assert np.array_equal((kl > 0).all(0).numpy(), [False] * 3 + [True] * 5 + [False] * 2)
    assert torch.equal(kl[:, [0, 1, 2, 8, 9]], torch.zeros(3, 5))


def test_steps_that_are_repeated_have_no_density(bench: Bench) -> None:
    """And mix better: noised again and guided once more at each level, x_0 moves further."""
    once, twice = (
        bench.sample(TFG(exponents=(1.0,), scale=0.1, mean_scale=0.05, smoothing=0.0, num_recurrences=n), 600)
        for n in (1, 2)
    )
    assert once.kl_per_step is not None and twice.kl_per_step is None and twice.log_ratio is None
    assert float(twice.clean_latents.mean()) > float(once.clean_latents.mean()) + 0.1
