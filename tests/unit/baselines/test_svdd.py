"""SVDD: each step's law is tilted by the reward of x̂_0 at the next timestep; the limit of many candidates by quadrature."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_expit

from ctrl_ray.baselines.noise import ImageNoise, ParticleNoise
from ctrl_ray.baselines.svdd import SVDD
from ctrl_ray.exact.chain import alphas_cumprod, reference_chain, timesteps
from ctrl_ray.exact.grid import make_grid, make_kernel
from ctrl_ray.exact.suite import TWO_MODES, logistic
from ctrl_ray.gradients.rollout import rollout
from tests.unit.baselines.closed_forms import Bench


def _limit(num_steps: int, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """(centres, law of x_0) where each step is tilted by e^(ℓ / α) exactly."""
    problem = logistic(num_steps=num_steps).problem
    grid = make_grid(problem, 600)
    x, law, times = grid.centres, grid.initial(), timesteps(num_steps)
    for k, step in enumerate(reference_chain(problem.mixture, problem.sampler)):
        clean = x
        if k + 1 < num_steps:
            alpha = alphas_cumprod()[times[k + 1]]
            clean = (x - np.sqrt(1 - alpha) * TWO_MODES.noise(x, alpha)) / np.sqrt(alpha)
        kernel = make_kernel(grid, step.mean(x), step.std)
        weights = kernel.mass * np.exp((log_expit(clean) / temperature)[kernel.columns])
        law = type(kernel)(kernel.columns, weights / weights.sum(1, keepdims=True)).forward(law)
    return x, law


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_many_candidates_tilt_each_step(temperature: float) -> None:
    x, law = _limit(5, temperature)
    mean, positive = float(law @ x), float(law[x > 0].sum())
    bench = Bench.of(logistic(num_steps=5))
    found = bench.sample(
        SVDD(exponents=(1.0,), num_particles=150, temperature=temperature), 1500
    ).clean_latents.double()
    assert float(found.mean()) == pytest.approx(mean, abs=4 * float(found.std()) / 1500**0.5)
    assert float((found > 0).double().mean()) == pytest.approx(
        positive, abs=4 * (positive * (1 - positive) / 1500) ** 0.5
    )
    assert abs(mean) > 0.5  # far from the pre-trained model's 0


def test_at_temperature_0_the_best_candidate_is_kept() -> None:
    """By hand: the candidate whose x̂_0 the logistic reward likes best."""
    bench = Bench.of(logistic(num_steps=3))
    kernel = bench.learner.kernel
    found = bench.sample(SVDD(exponents=(1.0,), num_particles=4, temperature=0.0), 2).latents
    draw = ParticleNoise(ImageNoise(bench.noise(2)), 4)
    latents = draw(0)[::4]
    for k in range(3):
        output = bench.policy(latents, kernel.time(k), bench.inputs(2), reference=True)
        step = kernel.step(k, latents, output)
        candidates = step.mean[:, None] + step.std * draw(k + 1).view(2, 4, 1)
        clean = candidates.view(8, 1)
        if k < 2:
            signal, level = kernel.scales(k + 1)  # type: ignore[attr-defined]
            noise = bench.policy(clean, kernel.time(k + 1), bench.inputs(8), reference=True).prediction
            clean = (clean - level * noise) / signal
        best = clean.view(2, 4).argmax(1)
        latents = candidates[range(2), best]
        torch.testing.assert_close(found[k + 1], latents)


def test_one_candidate_is_plain_sampling_and_images_are_apart() -> None:
    bench = Bench.of(logistic(num_steps=5))
    plain = rollout(bench.policy, bench.learner.kernel, bench.inputs(4), bench.noise(4), reference=True)
    torch.testing.assert_close(bench.sample(SVDD(exponents=(1.0,), num_particles=1), 4).latents, plain.latents)
    many = bench.sample(SVDD(exponents=(1.0,)), 4).latents
    one = bench.sample(SVDD(exponents=(1.0,)), 1, lambda k: bench.noise(4)(k)[2:3]).latents
    torch.testing.assert_close(one[:, 0], many[:, 2])


def test_equal_rewards_choose_evenly() -> None:
    """With an exponent of 0 every candidate is as good: the law is the pre-trained model's."""
    bench = Bench.of(logistic(num_steps=5))
    found = bench.sample(SVDD(exponents=(0.0,), num_particles=3), 2000).clean_latents[:, 0].double()
    x, law = _limit(5, 1e9)
    assert float((found > 0).double().mean()) == pytest.approx(float(law[x > 0].sum()), abs=4 * 0.5 / 2000**0.5)
