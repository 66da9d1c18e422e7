"""The main job's fine-tuning on small pipelines of every other family: two workers, sharded; then samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ctrl_ray
from ctrl_ray.config import AdapterConfig, ControlConfig, LoraConfig, SamplerConfig, ScalingConfig
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import build_policy
from ctrl_ray.reporting.tracking import read_metrics
from tests.classifiers import save_classifier
from tests.configs import tiny_run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("ray_session")]

CONTROL = ControlConfig(oracle="jpeg_size", thresholds=(1455.0, 1472.0, 1491.0), unit="bytes", guidance_strength=2.0)


@pytest.mark.parametrize(
    ("family", "zero_stage", "size"),
    [
        pytest.param("tiny_xl_pipeline", 2, {"height": 32, "width": 48}, marks=pytest.mark.slow),
        pytest.param(
            *("tiny_3_pipeline", 3, {"height": 48, "width": 32, "max_sequence_length": 8}), marks=pytest.mark.full
        ),
        pytest.param(
            *("tiny_aura_flow_pipeline", 1, {"height": 32, "width": 48, "max_sequence_length": 6}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_family_trains_resumes_and_samples(
    family: str, zero_stage: Any, size: Mapping[str, int], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Guided, label gains, images that are not square, two updates of two workers with a stop between, from end to end. The
    adapter draws other images than the pre-trained model with the class and the same without; the class's file is a LoRA of the
    stock pipeline; candidates draw; and another run may go on from the adapter."""
    pipeline: Path = request.getfixturevalue(family)
    save_classifier(tmp_path / "classifier", "jpeg_size", CONTROL)
    config = dataclasses.replace(
        tiny_run(pipeline),
        output_dir=str(tmp_path / "run"),
        num_updates=2,
        controls={"jpeg_size": dataclasses.replace(CONTROL, classifier=str(tmp_path / "classifier"))},
        sampler=SamplerConfig(num_steps=3, guidance_scale=3.0, reference_steps=1, **size),
        adapter=AdapterConfig(kind="gains"),
        lora=LoraConfig(rank=2, alpha=2.0, target_modules=("to_q", "to_out.0")),
        scaling=ScalingConfig(num_workers=2, threads_per_worker=1, zero_stage=zero_stage, max_failures=0),
    )
    ctrl_ray.fit(dataclasses.replace(config, num_updates=1))
    run = ctrl_ray.fit(config, resume=True)
    assert run.adapter is not None and run.summary["after"]["kl"] > 0
    assert [row["update"] for row in read_metrics(tmp_path / "run") if row["kind"] == "update"] == [1, 2]
    pipe = ctrl_ray.ControlledPipeline.from_pretrained(str(run.adapter))
    pipe.set_progress_bar_config(disable=True)

    def draw(**options: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        found: np.ndarray = pipe("a red circle", generator=generator, output_type="np", **options).images
        assert found.shape == (1, size["height"], size["width"], 3)
        return found

    plain = draw(adapter_scale=0.0)
    assert np.array_equal(draw(), plain)
    assert np.abs(draw(controls={"jpeg_size": 3}) - plain).max() > 1e-4
    draw(controls={"jpeg_size": 3}, num_candidates=2)
    stock = load_backbone(str(pipeline)).load_pipeline()
    stock.load_lora_weights(run.adapter / "classes", weight_name="jpeg_size=3.safetensors")
    assert stock.get_active_adapters()
    further = build_policy(dataclasses.replace(config, init_adapter=str(run.adapter)))
    assert any(parameter.abs().max() > 0 for name, parameter in further.named_parameters() if "gains" in name)
