"""A folder belongs to one run."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ctrl_ray import embedded
from ctrl_ray.config import ControlConfig, ScalingConfig, TrainConfig
from ctrl_ray.config.json import train_config_from_json
from ctrl_ray.errors import ConfigError, RunFolderError
from ctrl_ray.runs.folder import RunFolder, changed_settings

CONFIG = TrainConfig(controls={"size": ControlConfig(classes=("a", "b"))})


def test_a_new_run_needs_an_empty_folder_and_a_resumed_one_its_own(tmp_path: Path) -> None:
    """Both directions, and what the messages say to do."""
    folder = RunFolder(str(tmp_path / "run"))
    with pytest.raises(RunFolderError, match="no run to resume"):
        folder.prepare(CONFIG, resume=True)
    folder.prepare(CONFIG, resume=False)
    assert train_config_from_json((tmp_path / "run" / "config.json").read_text()) == CONFIG
    with pytest.raises(RunFolderError, match=r"already holds a run.*--resume"):
        folder.prepare(CONFIG, resume=False)
    folder.prepare(dataclasses.replace(CONFIG, num_updates=99), resume=True)
    with pytest.raises(ConfigError, match=r"kl_coef: 1\.0 → 2\.0"):
        folder.prepare(dataclasses.replace(CONFIG, num_updates=99, kl_coef=2.0), resume=True)


def test_another_number_of_workers_may_resume() -> None:
    """What decides the samples may not change; what decides the machines may."""
    other = dataclasses.replace(CONFIG, scaling=ScalingConfig(num_workers=2, zero_stage=2), output_dir="x")
    assert changed_settings(CONFIG, other) == []
    stronger = dataclasses.replace(CONFIG, controls={"size": ControlConfig(classes=("a", "b"), guidance_strength=3.0)})
    assert changed_settings(CONFIG, stronger) == ["controls.size.guidance_strength: 1.0 → 3.0"]


def test_another_checkout_may_resume() -> None:
    """What ships with the package is the same wherever that lies; another folder of that name is not."""

    def with_classifier(path: str) -> TrainConfig:
        return dataclasses.replace(CONFIG, controls={"size": ControlConfig(classes=("a", "b"), classifier=path)})

    here = with_classifier(str(embedded.CLASSIFIER))
    assert changed_settings(with_classifier("/elsewhere/site-packages/ctrl_ray/shapes/classifier"), here) == []
    for other in ("/elsewhere/shapes/classifier", "/elsewhere/ctrl_ray/shapes/classifier/x", "/mine"):
        assert len(changed_settings(with_classifier(other), here)) == 1
        assert len(changed_settings(here, with_classifier(other))) == 1


def test_unknown_filesystem_is_an_error() -> None:
    """With what is known."""
    with pytest.raises(ConfigError, match="cannot be opened"):
        RunFolder("nosuchfs://bucket/run")
