"""The reference chain in float64: what the pre-trained sampler does to one coordinate, from its equations alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ctrl_ray.exact.problems import Array, Mixture, Sampler


@dataclass(frozen=True)
class Step:
    """x' ~ N(mean(x), std²)."""

    mean: Callable[[Array], Array]
    std: float
    timestep: int


def alphas_cumprod() -> Array:
    """ᾱ of the 1000 training steps: betas linear in their square roots from 0.00085 to 0.012."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)


def timesteps(num_steps: int) -> list[int]:
    """Leading spacing with an offset of 1, descending."""
    stride = 1000 // num_steps
    return [min(999, i * stride + 1) for i in reversed(range(num_steps))]


def reference_chain(mixture: Mixture, sampler: Sampler) -> list[Step]:
    """The DDIM steps (Song et al. 2021, eq. 12) with the mixture's exact noise prediction, noise first.

    The last step ends at ᾱ of the first training step, so that it has a density.
    """
    table = alphas_cumprod()
    stride = 1000 // sampler.num_steps
    steps = []
    for timestep in timesteps(sampler.num_steps):
        alpha, following = table[timestep], table[timestep - stride] if timestep >= stride else table[0]
        std = sampler.eta * np.sqrt((1 - following) / (1 - alpha) * (1 - alpha / following))
        steps.append(Step(_mean(mixture, alpha, following, std), float(std), timestep))
    return steps


def _mean(mixture: Mixture, alpha: float, following: float, std: float) -> Callable[[Array], Array]:
    direction = np.sqrt(max(0.0, 1 - following - std**2))

    def mean(x: Array) -> Array:
        noise = mixture.noise(x, alpha)
        clean = (x - np.sqrt(1 - alpha) * noise) / np.sqrt(alpha)
        return np.asarray(np.sqrt(following) * clean + direction * noise)

    return mean
