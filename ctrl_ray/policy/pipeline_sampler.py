"""Samples of the pre-trained pipeline, by diffusers' own sampler: what the reward will be asked about."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from ctrl_ray.config import TrainConfig
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.backbones import load_backbone

_SAMPLES_PER_BATCH = 64


class PipelineSampler:
    """Samples of the pre-trained pipeline; the pipeline is loaded when first called, in the process that calls.

    Args:
        config: Base model and sampler.
        prompts: Taken in turn.
    """

    def __init__(self, config: TrainConfig, prompts: Sequence[str]) -> None:
        if not prompts:
            raise ConfigError("there are no prompts to sample the pipeline with; give --prompts-file")
        self.config, self.prompts = config, tuple(prompts)
        self._pipeline: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self.config, "prompts": self.prompts, "_pipeline": None}

    def __call__(self, num: int, seed: int) -> Iterator[tuple[np.ndarray, Sequence[str]]]:
        """Batches of samples, uint8 (B, H, W, 3), and their prompts: `num` in all, the same for the same seed."""
        if self._pipeline is None:
            self._pipeline = self._load()
        generator = torch.Generator().manual_seed(seed)
        sampler = self.config.sampler
        for start in range(0, num, _SAMPLES_PER_BATCH):
            count = min(_SAMPLES_PER_BATCH, num - start)
            prompts = [self.prompts[(seed + start + i) % len(self.prompts)] for i in range(count)]
            images = self._pipeline(
                prompts,
                num_inference_steps=sampler.num_steps,
                eta=sampler.eta,
                guidance_scale=sampler.guidance_scale,
                generator=generator,
                output_type="np",
            ).images
            yield (images * 255).round().astype(np.uint8), prompts

    def _load(self) -> Any:
        pipeline = load_backbone(self.config.base_model, self.config.base_revision).load_pipeline()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
