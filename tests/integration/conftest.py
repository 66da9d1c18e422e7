"""What integration tests share: one classifier, and a configuration of a run of seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from ctrl_ray.config import (
    ClassifierConfig,
    ControlConfig,
    EvaluationConfig,
    LoraConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)


@pytest.fixture(autouse=True)
def _one_ray() -> Iterator[None]:
    """A test leaves this process's Ray as it was: it asks for `ray_session`, and neither starts another nor ends it."""
    before = _address()
    yield
    assert _address() == before, "the test has started or ended a Ray in this process; let it use ray_session"


def _address() -> str | None:
    return ray.get_runtime_context().gcs_address if ray.is_initialized() else None


@pytest.fixture(scope="session")
def base_config(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> TrainConfig:
    """Six updates of eight trajectories, with a classifier fitted once for all tests."""
    from ctrl_ray.driver.classifier import fit_classifier

    config = TrainConfig(
        base_model=str(tiny_pipeline),
        data="shapes",
        num_drawn_images=160,
        num_updates=6,
        global_batch_size=8,
        micro_batch_size_per_worker=4,
        checkpoint_every_updates=3,
        controls={
            "jpeg_size": ControlConfig(
                oracle="jpeg_size", thresholds=(1000.0, 1200.0, 1400.0), unit="bytes", guidance_strength=2.0
            )
        },
        classifier=ClassifierConfig(epochs=1, batch_size=32),
        sampler=SamplerConfig(num_steps=3),
        lora=LoraConfig(rank=2, alpha=2.0),
        scaling=ScalingConfig(max_failures=0),
        evaluation=EvaluationConfig(every_updates=3, num_samples=8, final_num_samples=8, batch_size=8),
        aim=False,
    )
    folder = tmp_path_factory.mktemp("classifier") / "jpeg_size"
    fit_classifier(config, "jpeg_size", output_dir=folder, quiet=True)
    control = dataclasses.replace(config.controls["jpeg_size"], classifier=str(folder))
    return dataclasses.replace(config, controls={"jpeg_size": control})
