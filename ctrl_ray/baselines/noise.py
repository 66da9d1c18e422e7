"""More noise than a sampler is given: of the further paths of an image, keyed by the image's own.

A sampler gets one noise for each image and step. Further particles and tries of an image draw theirs from generators whose key
is a hash of the image's x_T and first step's noise: an image depends on its own noise alone, whatever the others are, and
the first of its paths is the one of plain sampling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ctrl_ray.diffusion.noise import draw_key, draw_noise, draw_uniform
from ctrl_ray.gradients.rollout import NoiseSource


class ImageNoise:
    """The noise of B images, with a key for each."""

    def __init__(self, noise: NoiseSource) -> None:
        self._noise = noise
        self._first = [noise(0), noise(1)]
        rows = torch.stack(self._first, dim=1).float().cpu().contiguous()
        digests = [hashlib.blake2b(row.numpy().tobytes(), digest_size=8).digest() for row in rows]
        self.keys = [int.from_bytes(digest, "big") >> 1 for digest in digests]

    def __call__(self, index: int) -> Tensor:
        """A `NoiseSource`: the images' own noise."""
        return self._first[index] if index < 2 else self._noise(index)

    def uniform(self, image: int, step_index: int, purpose: str) -> float:
        """A number in [0, 1) of one image at one step."""
        return draw_uniform(self.keys[image], 0, step_index, purpose)

    def normal(self, index: int, purpose: str, count: int, shape: Sequence[int], like: Tensor) -> Tensor:
        """(B · count, *shape) standard normal, in the order of the images."""
        draws = [draw_noise(key, 0, [index], purpose, (count, *shape), device=like.device) for key in self.keys]
        return torch.cat(draws).flatten(0, 1)


class ParticleNoise:
    """The noise of N particles of each image, (B · N, ...) in the order of the images; particle 0 has the image's own."""

    def __init__(self, images: ImageNoise, num_particles: int) -> None:
        self._images, self._others = images, num_particles - 1
        self._generators = [torch.Generator().manual_seed(draw_key(key, 0, 0, "particles")) for key in images.keys]

    def __call__(self, index: int) -> Tensor:
        """0: x_T; k + 1: of step k. Asked once for each, in this order."""
        own = self._images(index)
        others = [torch.randn(self._others, *own.shape[1:], generator=one) for one in self._generators]
        return torch.cat([own[:, None], torch.stack(others).to(own)], dim=1).flatten(0, 1)


def repeated_tries(images: ImageNoise, number: int, rows: Sequence[int], num_steps: int) -> NoiseSource:
    """The noise of try `number` of some of the images; try 0 is plain sampling."""
    index = list(rows)
    if number == 0:
        return lambda k: images(k)[index]
    like = images(0)
    keys = [images.keys[row] for row in index]
    whole = torch.cat([draw_noise(key, 0, [number], "try", (num_steps + 1, *like.shape[1:])) for key in keys]).to(like)
    return lambda k: whole[:, k]
