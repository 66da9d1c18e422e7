"""The flow kernels against DDIM under a change of variables, diffusers' schedule, and by hand."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ctrl_ray.config import FlowSDE
from ctrl_ray.diffusion.ddim import DDIMKernel
from ctrl_ray.diffusion.flow import FlowKernel, dynamic_shift, flow_sigmas
from ctrl_ray.diffusion.steps import GaussianStep, ModelOutput, step_kl
from ctrl_ray.errors import ConfigError

SDES: tuple[FlowSDE, ...] = ("ancestral", "cps", "flow_grpo", "constant")
ETAS: dict[FlowSDE, float] = {"ancestral": 1.0, "cps": 0.8, "flow_grpo": 0.7, "constant": 0.5}


def _draws(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


@pytest.mark.parametrize("eta", [1.0, 0.4, 0.0])
def test_the_ancestral_step_is_ddims_under_a_change_of_variables(eta: float) -> None:
    """x of the flow is s y with s² = (1−σ)² + σ², and y is DDIM's at ᾱ = (1−σ)² / s²; every step, to 1e-12."""
    sigmas = flow_sigmas(10, shift=3.0)
    scales = [math.hypot(1 - sigma, sigma) for sigma in sigmas]
    alphas = [((1 - sigma) / scale) ** 2 for sigma, scale in zip(sigmas, scales, strict=True)]
    ddim = DDIMKernel(
        torch.tensor(alphas[::-1], dtype=torch.float64),
        range(10, 0, -1),
        final_alpha_cumprod=1.0,
        eta=eta,
        prediction_type="sample",
    )
    flow = FlowKernel(sigmas, eta=eta)
    for k in range(10):
        x, velocity = _draws(2, seed=k)
        ours = flow.step(k, x, ModelOutput(velocity))
        x_0 = x - sigmas[k] * velocity
        theirs = ddim.step(k, x / scales[k], ModelOutput(x_0))
        torch.testing.assert_close(ours.mean, scales[k + 1] * theirs.mean, rtol=0, atol=1e-12)
        assert flow.std(k) == pytest.approx(scales[k + 1] * ddim.std(k), abs=1e-12)
        assert flow.controlled(k) == ddim.controlled(k)


@pytest.mark.parametrize("sde", SDES)
def test_steps_by_hand(sde: FlowSDE) -> None:
    """Of σ = .8 → .5, from the equations in the velocity's terms, Euler forms as their papers have them."""
    sigma, following, eta = 0.8, 0.5, ETAS[sde]
    x, v = _draws(2)
    step = FlowKernel([sigma, following, 0.0], sde=sde, eta=eta).step(0, x, ModelOutput(v))
    x_0, noise, fall = x - sigma * v, x + (1 - sigma) * v, following - sigma
    if sde == "ancestral":
        variance = following**2 * (1 - (0.2 * 0.5 / (0.5 * 0.8)) ** 2)
        mean = 0.5 * x_0 + math.sqrt(0.25 - variance) * noise
    elif sde == "cps":
        variance = (following * math.sin(0.8 * math.pi / 2)) ** 2
        mean = 0.5 * x_0 + following * math.cos(0.8 * math.pi / 2) * noise
    else:
        g = 0.7 * math.sqrt(0.8 / 0.2) if sde == "flow_grpo" else 0.5
        variance = g**2 * -fall
        mean = x + (v + g**2 / (2 * sigma) * (x + (1 - sigma) * v)) * fall
    torch.testing.assert_close(step.mean, mean, rtol=0, atol=1e-12)
    assert float(step.std) == pytest.approx(math.sqrt(variance), rel=1e-12)


@pytest.mark.parametrize("sde", SDES)
def test_the_last_step_gives_x_0(sde: FlowSDE) -> None:
    kernel = FlowKernel(flow_sigmas(4), sde=sde, eta=ETAS[sde], reference_steps=1)
    x, v = _draws(2)
    step = kernel.step(3, x, ModelOutput(v))
    torch.testing.assert_close(step.mean, x - 0.25 * v, rtol=0, atol=1e-12)
    assert kernel.std(3) == 0 and [kernel.controlled(k) for k in range(4)] == [True, True, True, False]


def test_the_kl_of_an_ancestral_step() -> None:
    """½ (SNR' − SNR) ‖x_0 − x_0,ref‖², with SNR = ((1−σ)/σ)² and x_0 − x_0,ref = −σ (v − v_ref)."""
    sigmas = flow_sigmas(8, shift=2.0)
    kernel = FlowKernel(sigmas)
    for k in range(7):
        x, v, ref = _draws(3, seed=k)
        policy, reference = (kernel.step(k, x, ModelOutput(each)) for each in (v, ref))
        ratios = [((1 - sigma) / sigma) ** 2 for sigma in sigmas[k : k + 2]]
        expected = 0.5 * (ratios[1] - ratios[0]) * (sigmas[k] * (v - ref)).pow(2).flatten(1).sum(1)
        torch.testing.assert_close(step_kl(policy, reference), expected, rtol=1e-10, atol=0)


def test_what_each_keeps_of_the_noise_level() -> None:
    """With x_0 and ε known exactly the next latents' noise is σ' under the ancestral step and CPS; the Euler forms miss it by
    the square of the step's length."""
    for sde in ("ancestral", "cps"):
        for sigma, following in pairwise(flow_sigmas(6)):
            kernel = FlowKernel([sigma, following], sde=sde, eta=0.9)  # type: ignore[arg-type]
            assert kernel.std(0) ** 2 + _of_noise(kernel) ** 2 == pytest.approx(following**2, rel=1e-12, abs=1e-15)
    for sde in ("flow_grpo", "constant"):
        missed = []
        for fall in (1e-2, 1e-3):
            kernel = FlowKernel([0.6, 0.6 - fall], sde=sde, eta=0.7)  # type: ignore[arg-type]
            missed.append(abs(kernel.std(0) ** 2 + _of_noise(kernel) ** 2 - (0.6 - fall) ** 2))
        assert missed[0] / missed[1] == pytest.approx(100, rel=0.1) and missed[1] > 0


def test_flow_grpo_forgets_at_the_square_root_of_two() -> None:
    """In the limit of short steps it then is the ancestral step, whose g² is 2σ/(1−σ); at 0.7 it has a quarter of its noise."""
    pair = [0.6, 0.6 - 1e-6]
    variance = FlowKernel(pair).std(0) ** 2
    for eta, share in ((math.sqrt(2), 1.0), (0.7, 0.245)):
        assert FlowKernel(pair, sde="flow_grpo", eta=eta).std(0) ** 2 / variance == pytest.approx(share, rel=1e-4)
    first = FlowKernel(flow_sigmas(4), sde="flow_grpo", eta=0.7)
    assert first.std(0) == pytest.approx(0.7 * math.sqrt(0.75 / 0.25) * 0.5), "σ = 1 has the next one's strength"


@pytest.mark.parametrize("num_steps", [4, 28])
def test_sigmas_are_diffusers(num_steps: int) -> None:
    """With the shift of SD3, and with a dynamic one of 1024 tokens; times are 1000 σ."""
    even = np.linspace(1.0, 1.0 / num_steps, num_steps)
    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    static.set_timesteps(sigmas=even)
    np.testing.assert_allclose(flow_sigmas(num_steps, shift=3.0), static.sigmas.double(), rtol=1e-6)
    kernel = FlowKernel(flow_sigmas(num_steps, shift=3.0))
    times = [float(kernel.time(k)) for k in range(num_steps)]
    np.testing.assert_allclose(times, static.timesteps.double(), rtol=1e-6)
    mu = (1.15 - 0.5) / (4096 - 256) * (1024 - 256) + 0.5
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=even, mu=mu)
    assert dynamic_shift(1024) == pytest.approx(math.exp(mu))
    np.testing.assert_allclose(flow_sigmas(num_steps, shift=dynamic_shift(1024)), dynamic.sigmas.double(), rtol=1e-6)


def test_latents_keep_their_type() -> None:
    kernel = FlowKernel(flow_sigmas(3))
    x = torch.zeros(1, 2)
    step = kernel.step(0, x, ModelOutput(x.to(torch.bfloat16)))
    assert step.mean.dtype == step.std.dtype == torch.float32
    assert isinstance(step, GaussianStep) and step.std is kernel.step(0, x, ModelOutput(x)).std


@pytest.mark.parametrize("sigmas", [[1.0], [1.2, 0.0], [0.5, 0.5, 0.0], [0.5, -0.1], [float("nan"), 0.0]])
def test_sigmas_that_are_none(sigmas: list[float]) -> None:
    with pytest.raises(ConfigError, match="expected at least two numbers that fall"):
        FlowKernel(sigmas)


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigError, match=r"eta is 1\.1 with the flow's SDE 'cps'; expected a number from 0 to 1"):
        FlowKernel([1.0, 0.0], sde="cps", eta=1.1)
    with pytest.raises(ConfigError, match="expected a number from 0 to inf"):
        FlowKernel([1.0, 0.0], sde="constant", eta=-0.1)
    with pytest.raises(ConfigError, match="expected a positive number"):
        flow_sigmas(3, shift=0)
    with pytest.raises(ConfigError, match="expected at least 1"):
        flow_sigmas(0)


def _of_noise(kernel: FlowKernel) -> float:
    """b of the first step."""
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    # x and v of x_0 = 0 and ε = 1
    return float(kernel.step(0, kernel.scales(0).noise * one, ModelOutput(one - zero)).mean)
