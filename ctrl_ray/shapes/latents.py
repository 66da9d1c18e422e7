"""Latents of drawn images and their prompts, as both denoisers of `ctrl_ray.shapes.make` are trained on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from ctrl_ray.offline.shapes import PROMPTS
from ctrl_ray.shapes.training import draw_tensors, to_model_range

DROPPED = 0.1
"""Share of the prompts that a denoiser is not told."""


class Batch(NamedTuple):
    """What a denoiser is trained on at once."""

    latents: Tensor
    """(B, C, h, w), of about unit variance."""
    prompts: Tensor
    """(B,) rows of `token_ids`; the last is the empty prompt's."""
    noise: Tensor
    """As the latents."""
    quantiles: Tensor
    """(B,) in [0, 1), one in each of B equal intervals. It takes noise out of the loss."""


class PromptedLatents:
    """Latents of drawn images, and their prompts; batches are drawn by one generator."""

    def __init__(self, vae: AutoencoderKL, num_images: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        images, prompts = draw_tensors(num_images, seed)
        shift = vae.config.shift_factor or 0.0
        self.latents = (encode(vae, images, self._generator) - shift) * vae.config.scaling_factor
        self._prompts = torch.tensor([PROMPTS.index(prompt) for prompt in prompts])

    @staticmethod
    def token_ids(tokenizer: CLIPTokenizer) -> Tensor:
        """(prompts and the empty one, tokens)."""
        ids: Tensor = tokenizer([*PROMPTS, ""], padding="max_length", return_tensors="pt").input_ids
        return ids

    def batch(self, size: int) -> Batch:
        """The next one."""
        chosen = torch.randint(len(self.latents), (size,), generator=self._generator)
        dropped = torch.rand(size, generator=self._generator) < DROPPED
        prompts = torch.where(dropped, len(PROMPTS), self._prompts[chosen])
        latents = self.latents[chosen]
        noise = torch.randn(latents.shape, generator=self._generator)
        quantiles = (torch.arange(size) + torch.rand(size, generator=self._generator)) / size
        return Batch(latents, prompts, noise, quantiles)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """Sampled latents of uint8 images, before scaling."""
    chunks = [vae.encode(to_model_range(chunk)).latent_dist.sample(generator) for chunk in images.split(256)]
    return torch.cat(chunks)
