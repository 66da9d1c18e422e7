"""Samples of the pre-trained pipeline, by diffusers' own sampler: what the reward will be asked about."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ctrl_ray.config import TrainConfig
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.backbones.base import Backbone
from ctrl_ray.policy.decoder import LatentDecoder, to_uint8
from ctrl_ray.policy.precision import frozen_dtype

_PIXELS_PER_BATCH = 1 << 21
"""Eight images of 512 pixels a side; the built-in example's batch is the largest that there is."""
_LARGEST_BATCH = 64
_PIXELS_PER_CHUNK = 1 << 18
"""Decoded at a time: one image of 512 pixels a side, a whole batch of the built-in example."""


class PipelineSampler:
    """Samples of the pre-trained pipeline; the pipeline is loaded when first called, in the process that calls.

    It runs on that process's current GPU where the config's workers have one, in the precision of their backbone; images
    are decoded in float32. Batches get smaller with the image.

    Args:
        config: Base model, sampler, device and precision.
        prompts: Taken in turn.
    """

    def __init__(self, config: TrainConfig, prompts: Sequence[str]) -> None:
        if not prompts:
            raise ConfigError("there are no prompts to sample the pipeline with; give --prompts-file")
        self.config, self.prompts = config, tuple(prompts)
        self._loaded: tuple[Backbone, Any, LatentDecoder, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "prompts": self.prompts, "_loaded": None}

    def __call__(self, num: int, seed: int) -> Iterator[tuple[np.ndarray, Sequence[str]]]:
        """Batches of samples, uint8 (B, H, W, 3), and their prompts: `num` in all, the same for the same seed."""
        if self._loaded is None:
            self._loaded = self._load()
        backbone, pipeline, decoder, batch_size = self._loaded
        generator = torch.Generator().manual_seed(seed)
        sampler = self.config.sampler
        arguments = backbone.prepare_call(pipeline, sampler, generator)
        for start in range(0, num, batch_size):
            count = min(batch_size, num - start)
            prompts = [self.prompts[(seed + start + i) % len(self.prompts)] for i in range(count)]
            latents = pipeline(
                prompts,
                num_inference_steps=sampler.num_steps,
                guidance_scale=sampler.guidance_scale,
                output_type="latent",
                **arguments,
            ).images
            with torch.no_grad():
                yield to_uint8(decoder.decode(latents)).cpu().numpy(), prompts

    def _load(self) -> tuple[Backbone, Any, LatentDecoder, int]:
        """The backbone, its pipeline, what decodes its latents, and how many it draws at a time."""
        scaling = self.config.scaling
        device = "cuda" if scaling.use_gpu else "cpu"
        dtype = frozen_dtype(scaling.precision) if scaling.use_gpu else torch.float32
        backbone = load_backbone(self.config.base_model, self.config.base_revision, self.config.sampler)
        pipeline = backbone.load_pipeline(dtype)
        pipeline.set_progress_bar_config(disable=True)
        pixels = math.prod(backbone.image_size())
        decoder = backbone.load_decoder(max(1, _PIXELS_PER_CHUNK // pixels), device)
        pipeline.register_modules(vae=decoder.vae)  # one VAE for both
        return backbone, pipeline.to(device), decoder, max(1, min(_LARGEST_BATCH, _PIXELS_PER_BATCH // pixels))
