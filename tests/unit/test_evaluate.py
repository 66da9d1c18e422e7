"""Judging an adapter later: with what its run fitted to its machines."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from ctrl_ray.cluster import connection
from ctrl_ray.config import ControlConfig, LoraConfig, SamplerConfig
from ctrl_ray.distributed import sampling
from ctrl_ray.evaluate import sample_before_and_after
from ctrl_ray.policy.adapter import ADAPTER_FILE, make_adapter_info


@pytest.mark.parametrize(
    ("training", "batch_size", "expected"),
    [
        ({"precision": "bf16", "evaluation_batch_size": 16, "decode_chunk_size": 2}, None, ("bf16", 16, 2)),
        ({"precision": "bf16", "evaluation_batch_size": 16, "decode_chunk_size": 2}, 4, ("bf16", 4, 2)),
        ({}, None, ("fp32", 128, 32)),
    ],
    ids=["the run's", "another batch size", "an adapter that does not say"],
)
def test_precision_and_sizes_are_those_of_the_run(
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    training: dict[str, Any],
    batch_size: int | None,
    expected: tuple[str, int, int],
) -> None:
    """Of a run that fitted a GPU of 24 GB."""
    control = ControlConfig(oracle="jpeg_size", thresholds=(1000.0,), unit="bytes")
    info = make_adapter_info(
        base_model=str(tiny_pipeline),
        base_revision=None,
        controls={"jpeg_size": control},
        sampler=SamplerConfig(num_steps=2),
        lora=LoraConfig(rank=2),
        training=training,
    )
    (tmp_path / ADAPTER_FILE).write_text(info.to_json())
    asked: list[tuple[str, int, int]] = []
    monkeypatch.setattr(connection, "connected", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        sampling,
        "sample_policy",
        lambda job, rewards, scaling: asked.append((job.precision, job.batch_size, rewards.decode_chunk_size)),
    )
    sample_before_and_after(
        tmp_path, num_samples=4, prompts=["a cross"], batch_size=batch_size, classifiers={"jpeg_size": str(tmp_path)}
    )
    assert asked == [expected] * 2
