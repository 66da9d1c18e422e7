"""Pipelines of large models without their weights: whole by their configurations and headers, for what only counts."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel


def make_hollow(folder: Path, text_elements: int = 0) -> None:
    """Headers in the place of weights, and a tokenizer's file. text_elements: parameters of the text encoder, where they are
    counted."""
    shapes: dict[str, dict[str, list[int]]] = {"text_encoder": {"all": [text_elements]}}
    for part, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL), ("text_encoder", None)):
        (folder / part).mkdir(exist_ok=True)
        config = folder / part / "config.json"
        if not config.exists():
            config.write_text("{}")
        if kind is not None:
            with torch.device("meta"):
                module = kind.from_config(json.loads(config.read_text()))
            shapes[part] = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        tensors = {
            name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in shapes[part].items()
        }
        header = json.dumps(tensors).encode()
        (folder / part / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
