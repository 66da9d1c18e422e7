"""Random draws keyed by (seed, update, global sample id, purpose): the same on any number of workers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def draw_key(seed: int, update: int, sample_id: int, purpose: str) -> int:
    """63-bit generator seed: BLAKE2b of the four parts. Different parts give independent streams."""
    text = f"{seed}/{update}/{sample_id}/{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def draw_noise(
    seed: int,
    update: int,
    sample_ids: Sequence[int],
    purpose: str,
    shape: Sequence[int],
    *,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Standard normal noise (len(sample_ids), *shape), float32: one generator per sample, never per rank.

    Drawn on the CPU and moved, so that a GPU run sees the same samples as a CPU run.
    """
    noise = torch.empty(len(sample_ids), *shape)
    generator = torch.Generator()
    for row, sample_id in enumerate(sample_ids):
        generator.manual_seed(draw_key(seed, update, int(sample_id), purpose))
        torch.randn(*shape, generator=generator, out=noise[row])
    return noise.to(device)


def draw_uniform(seed: int, update: int, sample_id: int, purpose: str) -> float:
    """One number in [0, 1), keyed the same way."""
    return (draw_key(seed, update, sample_id, purpose) >> 10) / 2**53


def draw_index(seed: int, update: int, sample_id: int, purpose: str, weights: Sequence[float]) -> int:
    """An index in proportion to non-negative weights, keyed the same way."""
    threshold = draw_uniform(seed, update, sample_id, purpose) * sum(weights)
    for index, weight in enumerate(weights):
        threshold -= weight
        if threshold < 0:
            return index
    return max(i for i, weight in enumerate(weights) if weight > 0)
