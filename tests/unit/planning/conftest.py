"""A pipeline of Stable Diffusion 1.5's shape without its weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from tests.hollow import make_hollow

TEXT_ENCODER_ELEMENTS = 123_060_480
"""CLIP ViT-L/14's text model."""


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path) -> Path:
    """A pipeline folder with the configurations of Stable Diffusion 1.5, and headers in the place of weights."""
    folder = tmp_path_factory.mktemp("sd15")
    with torch.device("meta"):
        UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8).save_config(folder / "unet")
        AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            sample_size=512,
        ).save_config(folder / "vae")
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((tiny_pipeline / name).read_bytes())
    (folder / "text_encoder").mkdir()
    (folder / "text_encoder" / "config.json").write_text(
        json.dumps({"max_position_embeddings": 77, "hidden_size": 768})
    )
    make_hollow(folder, TEXT_ENCODER_ELEMENTS)
    return folder
