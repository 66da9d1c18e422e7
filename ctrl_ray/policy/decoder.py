"""The VAE of a base model, as the reward and the evaluation use it: latents in, images in [0, 1] out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def clamp_straight_through(images: Tensor) -> Tensor:
    """clamp(images, 0, 1) whose gradient is the identity, so that out-of-range pixels can still be pulled back."""
    return images.detach().clamp(0, 1) + (images - images.detach())


class LatentDecoder(nn.Module):
    """A VAE in float32 and eval mode, with the base model's latent scaling; its weights are frozen."""

    def __init__(self, vae: Any, chunk_size: int = 32) -> None:
        """vae: of diffusers' autoencoder interface (`encode`, `decode`, `config.scaling_factor`, ...)."""
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.scaling_factor = float(vae.config.scaling_factor)
        self.shift_factor = float(getattr(vae.config, "shift_factor", None) or 0.0)
        self.chunk_size = chunk_size

    @property
    def downsampling(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), float32 in [0, 1], of latents (B, C, h, w); differentiable, decoded in chunks.

        Out-of-range pixels are clamped with a straight-through gradient: the classifier sees what the oracle sees.
        """
        scaled = latents.float() / self.scaling_factor + self.shift_factor
        chunks = [self.vae.decode(chunk).sample for chunk in scaled.split(self.chunk_size)]
        return clamp_straight_through(torch.cat(chunks) / 2 + 0.5)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents (the posterior's mean) of images (B, 3, H, W) in [0, 1]; H and W multiples of `downsampling`."""
        chunks = [self.vae.encode(chunk * 2 - 1).latent_dist.mean for chunk in images.float().split(self.chunk_size)]
        return (torch.cat(chunks) - self.shift_factor) * self.scaling_factor


def to_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Images uint8 (B, H, W, 3) as float32 (B, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 255


def to_uint8(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] as the uint8 array (B, H, W, 3) that a PNG stores."""
    return (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
