"""The reference chain in float64: what the pre-trained sampler does to one coordinate, from its equations alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ctrl_ray.exact.problems import Array, Mixture, Sampler


@dataclass(frozen=True)
class Step:
    """x' ~ N(mean(x), std²); a std of 0 is a step of the reference."""

    mean: Callable[[Array], Array]
    std: float
    time: float
    """As the network is told it: a timestep, or 1000 σ."""


def alphas_cumprod() -> Array:
    """ᾱ of the 1000 training steps: betas linear in their square roots from 0.00085 to 0.012."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)


def timesteps(num_steps: int) -> list[int]:
    """Leading spacing with an offset of 1, descending."""
    stride = 1000 // num_steps
    return [min(999, i * stride + 1) for i in reversed(range(num_steps))]


def reference_chain(mixture: Mixture, sampler: Sampler) -> list[Step]:
    """The sampler's steps with the mixture's exact prediction, noise first."""
    return _flow_chain(mixture, sampler) if sampler.kernel == "flow" else _ddim_chain(mixture, sampler)


def _ddim_chain(mixture: Mixture, sampler: Sampler) -> list[Step]:
    """The DDIM steps (Song et al. 2021, eq. 12) with the mixture's exact noise prediction, noise first.

    The last step ends at ᾱ of the first training step, so that it has a density.
    """
    table = alphas_cumprod()
    stride = 1000 // sampler.num_steps
    steps = []
    for timestep in timesteps(sampler.num_steps):
        alpha, following = table[timestep], table[timestep - stride] if timestep >= stride else table[0]
        std = sampler.eta * np.sqrt((1 - following) / (1 - alpha) * (1 - alpha / following))
        steps.append(Step(_ddim_mean(mixture, alpha, following, std), float(std), timestep))
    return steps


def _ddim_mean(mixture: Mixture, alpha: float, following: float, std: float) -> Callable[[Array], Array]:
    direction = np.sqrt(max(0.0, 1 - following - std**2))

    def mean(x: Array) -> Array:
        noise = mixture.noise(x, alpha)
        clean = (x - np.sqrt(1 - alpha) * noise) / np.sqrt(alpha)
        return np.asarray(np.sqrt(following) * clean + direction * noise)

    return mean


def _flow_chain(mixture: Mixture, sampler: Sampler) -> list[Step]:
    """Steps of flow matching, x_σ = (1 − σ) x_0 + σ ε, from σ = 1 to 0."""
    even = np.linspace(1.0, 0.0, sampler.num_steps + 1)
    sigmas = sampler.shift * even / (1 + (sampler.shift - 1) * even)
    return [
        Step(_flow_mean(mixture, sampler, sigma, following), _flow_std(sampler, sigma, following), 1000 * float(sigma))
        for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True)
    ]


def _flow_std(sampler: Sampler, sigma: float, following: float) -> float:
    if following == 0:
        return 0.0
    if sampler.sde == "cps":
        return float(following * np.sin(sampler.eta * np.pi / 2))
    if sampler.sde == "ancestral":
        # of x_σ' given x_σ and x_0, where x_σ = r x_σ' + noise of variance σ² − r² σ'²
        r = (1 - sigma) / (1 - following)
        return float(sampler.eta * np.sqrt(following**2 * (sigma**2 - (r * following) ** 2) / sigma**2))
    return float(_strength(sampler, sigma, following) * np.sqrt(sigma - following))


def _strength(sampler: Sampler, sigma: float, following: float) -> float:
    """g of the SDE dx = [...] dσ + g dw."""
    if sampler.sde == "constant":
        return sampler.eta
    at = following if sigma == 1 else sigma
    return float(sampler.eta * np.sqrt(at / (1 - at)))


def _flow_mean(mixture: Mixture, sampler: Sampler, sigma: float, following: float) -> Callable[[Array], Array]:
    std = _flow_std(sampler, sigma, following)

    def mean(x: Array) -> Array:
        v = mixture.velocity(x, sigma)
        if following == 0 or sampler.sde in ("ancestral", "cps"):
            kept = np.sqrt(max(0.0, following**2 - std**2))
            return np.asarray((1 - following) * (x - sigma * v) + kept * (x + (1 - sigma) * v))
        drift = v + _strength(sampler, sigma, following) ** 2 / (2 * sigma) * (x + (1 - sigma) * v)
        return np.asarray(x + (following - sigma) * drift)

    return mean
