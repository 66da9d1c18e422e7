"""What integration tests share: one classifier, and a configuration of a run of seconds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from ctrl_ray.config import EvaluationConfig, TrainConfig
from tests.configs import tiny_run


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

    config = dataclasses.replace(
        tiny_run(tiny_pipeline),
        num_updates=6,
        checkpoint_every_updates=3,
        evaluation=EvaluationConfig(
            every_updates=3, num_samples=8, final_num_samples=8, log_z_samples=8, max_log_z_samples=8, batch_size=8
        ),
    )
    folder = tmp_path_factory.mktemp("classifier") / "jpeg_size"
    fit_classifier(config, "jpeg_size", output_dir=folder, quiet=True)
    control = dataclasses.replace(config.controls["jpeg_size"], classifier=str(folder))
    return dataclasses.replace(config, controls={"jpeg_size": control})
