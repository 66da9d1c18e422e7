"""Pipelines of large models without their weights: whole by their configurations and headers, for what only counts."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path


def make_hollow(folder: Path, elements: Mapping[str, int]) -> None:
    """Headers in the place of weights (`elements`: parameters by part, where they are counted), and a tokenizer's file."""
    for part in ("unet", "text_encoder", "vae"):
        (folder / part).mkdir(exist_ok=True)
        tensors = (
            {"all": {"dtype": "F32", "shape": [elements[part]], "data_offsets": [0, 0]}} if part in elements else {}
        )
        header = json.dumps(tensors).encode()
        (folder / part / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
        if not (folder / part / "config.json").exists():
            (folder / part / "config.json").write_text("{}")
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
