"""The DDIM chain against diffusers' scheduler, torch.distributions, and by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler

from ctrl_ray.config import SamplerConfig
from ctrl_ray.diffusion.ddim import DDIMKernel, predict_x_0_and_noise
from ctrl_ray.diffusion.noise import draw_index, draw_noise, draw_uniform
from ctrl_ray.diffusion.steps import (
    GaussianStep,
    Guidance,
    ModelOutput,
    combine_guidance,
    gaussian_log_prob,
    step_kl,
)
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.schedule import ddim_scheduler, load_kernel

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_step_equals_diffusers_at_the_same_noise(spacing: str, prediction_type: str, eta: float) -> None:
    """Every step, last one included; a step from timestep 0 (linspace) has no density, as there is no ᾱ beyond it."""
    config = dict(
        DDIMScheduler(**SCHEDULE, timestep_spacing=spacing, prediction_type=prediction_type, steps_offset=1).config
    )
    scheduler = ddim_scheduler(config)
    kernel = load_kernel(scheduler, SamplerConfig(num_steps=10, eta=eta))
    generator = torch.Generator().manual_seed(0)
    for k, timestep in enumerate(scheduler.timesteps):
        latents, prediction, noise = (torch.randn(2, 4, 3, 3, generator=generator) for _ in range(3))
        theirs = scheduler.step(prediction, timestep, latents, eta=eta, variance_noise=noise).prev_sample
        ours = kernel.step(k, latents, ModelOutput(prediction))
        assert int(kernel.time(k)) == int(timestep)
        assert (kernel.std(k) > 0) == (int(timestep) > 0)
        torch.testing.assert_close(ours.mean + ours.std * noise, theirs, rtol=1e-5, atol=2e-5)


def test_last_step_has_no_density_when_it_ends_at_alpha_1() -> None:
    """The defect of the public code: std 0 would divide by zero."""
    scheduler = DDIMScheduler(**SCHEDULE, set_alpha_to_one=True)
    scheduler.set_timesteps(5)
    kernel = DDIMKernel(
        scheduler.alphas_cumprod,
        scheduler.timesteps.tolist(),
        final_alpha_cumprod=1.0,
        eta=1.0,
        prediction_type="epsilon",
        num_train_timesteps=1000,
    )
    assert [kernel.std(k) > 0 for k in range(5)] == [True] * 4 + [False]
    step = GaussianStep(torch.zeros(1, 2), torch.tensor(0.0))
    with pytest.raises(ValueError, match="no density"):
        step_kl(step, step)


def test_prediction_types_round_trip_in_float64() -> None:
    """ε ↔ x_0 ↔ v agree with x_t = √ᾱ x_0 + √(1−ᾱ) ε."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    alpha = 0.37
    x_t = alpha**0.5 * x_0 + (1 - alpha) ** 0.5 * noise
    velocity = alpha**0.5 * noise - (1 - alpha) ** 0.5 * x_0
    for prediction, kind in ((noise, "epsilon"), (velocity, "v_prediction"), (x_0, "sample")):
        got_x_0, got_noise = predict_x_0_and_noise(x_t, prediction, alpha, kind)  # type: ignore[arg-type]
        torch.testing.assert_close(got_x_0, x_0, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(got_noise, noise, rtol=1e-12, atol=1e-12)


def test_kl_equals_torch_distributions() -> None:
    """Fixed and learned variance, sum and mean over latent dimensions; equal policies have KL 0."""
    generator = torch.Generator().manual_seed(0)
    mean, ref_mean = (torch.randn(4, 3, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    std, other = torch.tensor(0.3, dtype=torch.float64), torch.rand(4, 3, 2, generator=generator).double() + 0.1
    normal = torch.distributions.Normal
    for a, b in ((std, std), (other, std)):
        expected = torch.distributions.kl_divergence(
            normal(mean, a.expand_as(mean)), normal(ref_mean, b.expand_as(mean))
        )
        got = step_kl(GaussianStep(mean, a), GaussianStep(ref_mean, b))
        torch.testing.assert_close(got, expected.flatten(1).sum(1))
        torch.testing.assert_close(step_kl(GaussianStep(mean, a), GaussianStep(ref_mean, b), "mean"), got / 6)
    assert step_kl(GaussianStep(mean, std), GaussianStep(mean, std)).abs().max() == 0
    torch.testing.assert_close(
        gaussian_log_prob(GaussianStep(mean, other), ref_mean), normal(mean, other).log_prob(ref_mean).flatten(1).sum(1)
    )


def test_guidance_by_hand() -> None:
    """ε_u + w (ε_p − ε_u) + s (ε_c − ε_p), by the predictions whose factor in it is not 0; without s, it is w."""
    known = {"null": torch.tensor(1.0), "prompt": torch.tensor(2.0), "control": torch.tensor(5.0)}
    for w, s, branches in (
        (1.0, None, ("control",)),
        (1.0, 1.0, ("control",)),
        (3.0, None, ("null", "control")),
        (3.0, 3.0, ("null", "control")),
        (1.0, 0.5, ("prompt", "control")),
        (3.0, 0.5, ("null", "prompt", "control")),
        (3.0, 1.0, ("null", "prompt", "control")),
    ):
        guidance = Guidance(w, s)
        assert guidance.branches == branches and guidance.num_branches == len(branches)
        found = combine_guidance(tuple(known[branch] for branch in branches), guidance)
        assert found == 1 + w * 1 + (w if s is None else s) * 3, (w, s)


def test_draws_depend_on_the_sample_and_not_on_its_neighbours() -> None:
    """Keyed noise: any split of the ids gives the same rows; other seeds, updates and purposes give others."""
    whole = draw_noise(1, 2, [5, 6, 7], "initial", (3, 2))
    assert torch.equal(whole[1:], draw_noise(1, 2, [6, 7], "initial", (3, 2)))
    for other in ((0, 2, "initial"), (1, 3, "initial"), (1, 2, "step 0")):
        assert not torch.equal(whole, draw_noise(other[0], other[1], [5, 6, 7], other[2], (3, 2)))
    many = draw_noise(0, 0, range(400), "initial", (50,))
    assert abs(float(many.mean())) < 4 / 20000**0.5
    assert abs(float(many.std()) - 1) < 4 / 40000**0.5
    draws = [draw_uniform(0, 0, i, "x") for i in range(2000)]
    assert abs(sum(draws) / 2000 - 0.5) < 4 * (1 / 12 / 2000) ** 0.5
    counts = [0, 0, 0]
    for i in range(3000):
        counts[draw_index(0, 0, i, "label", (1.0, 0.0, 3.0))] += 1
    assert counts[1] == 0
    assert abs(counts[0] / 3000 - 0.25) < 4 * (0.25 * 0.75 / 3000) ** 0.5


def test_unknown_prediction_type_and_eta(tmp_path: Path) -> None:
    """Both are errors with the valid values."""
    with pytest.raises(ConfigError, match="expected epsilon, v_prediction or sample"):
        predict_x_0_and_noise(torch.zeros(1), torch.zeros(1), 0.5, "flow")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="eta is 2"):
        DDIMKernel(torch.ones(10) * 0.5, [5, 1], final_alpha_cumprod=0.9, eta=2, prediction_type="epsilon")
