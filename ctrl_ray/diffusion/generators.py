"""The noise of a call that is given torch generators, as diffusers' pipelines are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ctrl_ray.errors import ConfigError

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One for all images or one for each; None: torch's own."""


def generator_noise(
    count: int, shape: Sequence[int], generator: Generators, latents: Tensor | None, device: torch.device
) -> Callable[[int], Tensor]:
    """Standard normal noise (count, *shape): x_T at the first call (or `latents` in its place), then each step's.

    Drawn where the generator lives and moved, so that the CPU's gives the same on a GPU. Raises ConfigError for another
    number of generators than images, and for latents of another shape.
    """
    check_noise(count, shape, generator, latents)

    def noise(index: int) -> Tensor:
        if index == 0 and latents is not None:
            return latents.to(device, torch.float32)
        if isinstance(generator, Sequence):
            return torch.cat([_draw((1, *shape), one, device) for one in generator])
        return _draw((count, *shape), generator, device)

    return noise


def image_seeds(count: int, generator: Generators) -> list[int]:
    """A 63-bit number for each image, drawn from its generator (or, one by one, from that of all)."""
    of_images = generator if isinstance(generator, Sequence) else [generator] * count
    seeds = [
        torch.randint(2**63 - 1, (1,), generator=one, device="cpu" if one is None else one.device) for one in of_images
    ]
    return [int(seed) for seed in seeds]


def check_noise(count: int, shape: Sequence[int], generator: Generators, latents: Tensor | None) -> None:
    """ConfigError unless generators and latents are those of `count` images of this shape."""
    if isinstance(generator, Sequence) and len(generator) != count:
        raise ConfigError(
            f"there are {len(generator)} generators for {count} images; give one for each, or one for all"
        )
    if latents is not None and tuple(latents.shape) != (count, *shape):
        raise ConfigError(f"latents have shape {tuple(latents.shape)}; expected {(count, *shape)}")


def _draw(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
    where = device if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=where).to(device)
