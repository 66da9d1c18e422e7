"""The default network of p(y|x,c): a small residual network beside the spectrum of 8x8 blocks."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 8
"""Side of a block in pixels: that of JPEG's transform, so that what a block costs to store is one of the features."""

_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
_FIRST_STEP = 4 / 255


def cosine_basis(size: int = BLOCK) -> Tensor:
    """The orthonormal DCT-II basis of size x size patches: (size**2, size, size), vertical frequency first."""
    k, n = torch.arange(size, dtype=torch.float64)[:, None], torch.arange(size, dtype=torch.float64)[None]
    basis = torch.cos(math.pi * (2 * n + 1) * k / (2 * size)) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return torch.einsum("uy,vx->uvyx", basis, basis).reshape(size * size, size, size).float()


class BlockSpectrum(nn.Module):
    """How many bits the frequencies of each 8x8 block need, pooled over the image.

    Luma blocks and, at half resolution, chroma blocks go through the DCT; a coefficient a becomes the smooth number of
    bits ½ log2(1 + (a / step)²), with one learned step per frequency. A network on each block and its neighbours then
    says what the block costs; the mean over the blocks is what the image costs, up to its area.
    """

    ycbcr: Tensor
    basis: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("ycbcr", torch.tensor(_YCBCR)[:, :, None, None], persistent=False)
        self.register_buffer("basis", cosine_basis()[:, None], persistent=False)
        self.log_step = nn.Parameter(torch.full((3, BLOCK * BLOCK, 1, 1), math.log(_FIRST_STEP)))
        self.luma = _block_network(BLOCK * BLOCK, width)
        self.chroma = _block_network(2 * BLOCK * BLOCK, width)
        self.num_features = 2 * width

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of images (B, 3, H, W) in [0, 1]; edges are repeated up to whole blocks."""
        height, width = images.shape[-2:]
        padding = (0, -width % (2 * BLOCK), 0, -height % (2 * BLOCK))
        ycbcr = F.conv2d(F.pad(images, padding, mode="replicate") if any(padding) else images, self.ycbcr)
        luma = self.bits(ycbcr[:, :1] - 0.5, self.log_step[:1])
        chroma = self.bits(F.avg_pool2d(ycbcr[:, 1:], 2), self.log_step[1:])
        return torch.cat([self.luma(luma).mean((2, 3)), self.chroma(chroma).mean((2, 3))], dim=1)

    def bits(self, channels: Tensor, log_step: Tensor) -> Tensor:
        """(B, C, H, W) to the bits of its block coefficients (B, C * 64, H / 8, W / 8)."""
        count = channels.shape[1]
        coefficients = F.conv2d(channels, self.basis.repeat(count, 1, 1, 1), stride=BLOCK, groups=count)
        steps = log_step.reshape(1, count * BLOCK * BLOCK, 1, 1).exp()
        return 0.5 * torch.log2(1 + (coefficients / steps).square())


def _block_network(channels: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, width, 1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1), nn.GELU(),
        nn.Conv2d(width, width, 1), nn.GELU(),
    )  # fmt: skip


class ResidualBlock(nn.Module):
    """x + conv(gelu(conv(gelu(norm(x))))), the last convolution zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, width, h, w) to the same."""
        return hidden + self.second(F.gelu(self.first(F.gelu(self.norm(hidden)))))


class HashedText(nn.Module):
    """A prompt as the mean of learned vectors of its hashed words, word pairs and letter triples.

    It needs no vocabulary: a word that was never seen still shares its letter triples with others.
    """

    def __init__(self, width: int, num_buckets: int = 4096) -> None:
        super().__init__()
        self.num_buckets = num_buckets
        self.table = nn.EmbeddingBag(num_buckets, width, mode="mean")
        self.num_features = width

    def buckets(self, prompt: str) -> list[int]:
        """Bucket numbers of a prompt's pieces, the same in every process; an empty prompt has one of its own."""
        words = prompt.lower().split()
        pieces = [f"word {word}" for word in words] + [f"pair {' '.join(pair)}" for pair in pairwise(words)]
        for padded in (f"<{word}>" for word in words):
            pieces += [f"letters {padded[i : i + 3]}" for i in range(len(padded) - 2)]
        return [zlib.crc32(piece.encode()) % self.num_buckets for piece in pieces or ["empty"]]

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """Features (B, width) of B prompts."""
        bags = [self.buckets(prompt) for prompt in prompts]
        offsets = torch.tensor([0] + [len(bag) for bag in bags[:-1]]).cumsum(0)
        flat = torch.tensor([bucket for bag in bags for bucket in bag])
        device = self.table.weight.device
        return self.table(flat.to(device), offsets.to(device))


class ClassHead(nn.Module):
    """Features, and those of a prompt where y depends on it, to logits: FiLM by the prompt, then two hidden layers."""

    def __init__(self, num_features: int, num_classes: int, *, width: int = 128, num_text_features: int = 0) -> None:
        super().__init__()
        self.film = nn.Linear(num_text_features, 2 * num_features) if num_text_features else None
        self.layers = nn.Sequential(
            nn.Linear(num_features + num_text_features, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, num_classes),
        )  # fmt: skip

    def forward(self, features: Tensor, text: Tensor | None = None) -> Tensor:
        """Logits (B, num_classes) of features (B, num_features) and text (B, num_text_features)."""
        if self.film is not None and text is not None:
            scale, shift = self.film(text).chunk(2, dim=1)
            features = torch.cat([features * (1 + scale) + shift, text], dim=1)
        return self.layers(features)


class SmallCNN(nn.Module):
    """The default network: `BlockSpectrum` and a few residual blocks on patches, averaged over the image.

    It averages over positions and never takes a maximum, so that every part of the image gets a gradient, and
    normalises within an image only, so that the answer does not depend on the batch.

    Args:
        num_classes: Number of logits.
        width: Channels of the residual branch; 0 leaves that branch out.
        depth: Residual blocks at a quarter of the resolution.
        block_width: Channels of the block branch; 0 leaves that branch out.
        prompt_conditional: Whether `forward` needs prompts.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        width: int = 24,
        depth: int = 1,
        block_width: int = 64,
        prompt_conditional: bool = False,
    ) -> None:
        super().__init__()
        self.spectrum = BlockSpectrum(block_width) if block_width else None
        self.residual = None
        num_features = 2 * block_width
        if width:
            self.residual = nn.Sequential(
                nn.Conv2d(3, width, 5, stride=2, padding=2), nn.GELU(), nn.Conv2d(width, width, 2, stride=2),
                *(ResidualBlock(width) for _ in range(depth)), nn.Conv2d(width, 2 * width, 2, stride=2),
                ResidualBlock(2 * width), nn.GELU(),
            )  # fmt: skip
            num_features += 2 * width
        self.text = HashedText(32) if prompt_conditional else None
        self.head = ClassHead(num_features, num_classes, num_text_features=32 if prompt_conditional else 0)

    def forward(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W) in [0, 1]."""
        features = [self.spectrum(images)] if self.spectrum is not None else []
        if self.residual is not None:
            features.append(self.residual(images * 2 - 1).mean((2, 3)))
        text = self.text(prompts) if self.text is not None and prompts is not None else None
        return self.head(torch.cat(features, dim=1), text)
