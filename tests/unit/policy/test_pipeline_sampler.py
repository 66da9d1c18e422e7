"""Samples of the pre-trained pipeline for stage 1."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctrl_ray.config import SamplerConfig, ScalingConfig, TrainConfig
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.backbones.stable_diffusion import StableDiffusion
from ctrl_ray.policy.pipeline_sampler import PipelineSampler

PROMPTS = ("a red circle", "a blue square", "a green cross")


def _sampler(folder: Path, **changes: Any) -> PipelineSampler:
    sampler = SamplerConfig(num_steps=2, guidance_scale=3.0)
    return PipelineSampler(TrainConfig(base_model=str(folder), sampler=sampler, controls={}, **changes), PROMPTS)


@pytest.mark.full
def test_samples_are_those_of_diffusers(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pixel by pixel; on the CPU where the workers have no card, whatever this machine has; also after it has travelled."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sampler = _sampler(tiny_pipeline)
    list(sampler(1, seed=0))
    ((images, prompts),) = pickle.loads(pickle.dumps(sampler))(3, seed=7)
    pipeline = load_backbone(str(tiny_pipeline)).load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    asked = [PROMPTS[(7 + i) % 3] for i in range(3)]
    generator = torch.Generator().manual_seed(7)
    expected = pipeline(
        asked, num_inference_steps=2, eta=1.0, guidance_scale=3.0, generator=generator, output_type="np"
    ).images
    assert prompts == asked and np.array_equal(images, (expected * 255).round().astype(np.uint8))


@pytest.mark.parametrize(("side", "batch", "chunk"), [(32, 64, 256), (512, 8, 1), (1024, 2, 1), (2048, 1, 1)])
def test_batches_get_smaller_with_the_image(
    tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch, side: int, batch: int, chunk: int
) -> None:
    """What is held at a time is bounded in pixels."""
    monkeypatch.setattr(StableDiffusion, "image_size", lambda self: (side, side))
    sampler = _sampler(tiny_pipeline)
    assert len(next(iter(sampler(100, seed=0)))[0]) == batch
    assert sampler._loaded is not None and sampler._loaded[2].chunk_size == chunk


def test_the_workers_card_and_precision(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser in the backbone's precision, the decoder in float32, both where the workers compute."""
    moved: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *where, **_: moved.append(str(where[0])) or self)
    sampler = _sampler(tiny_pipeline, scaling=ScalingConfig(use_gpu=True, precision="bf16"))
    _, pipeline, decoder, _ = sampler._load()
    assert "cuda" in moved
    assert next(pipeline.unet.parameters()).dtype == torch.bfloat16
    assert next(decoder.parameters()).dtype == torch.float32
