"""Paths of a config, which workers read from another working directory; prompts that are cut and data that are not read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from ctrl_ray.config import ControlConfig, EvaluationConfig, TrainConfig
from ctrl_ray.planning.preflight import _absolute_paths, _cut_prompts, _unread_data
from ctrl_ray.policy.backbones import load_backbone


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder; the working directory is `work` in it."""
    (tmp_path / "work" / "models" / "mine").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_no_relative_path_reaches_a_worker(home: Path) -> None:
    config = _absolute_paths(
        TrainConfig(
            base_model="models/mine",
            data="data.parquet",
            prompts_file="../prompts.txt",
            init_adapter="~/runs/first/adapter",
            evaluation=EvaluationConfig(prompts_file="./evaluation.txt", num_samples=7),
            controls={
                "size": ControlConfig(classifier="runs/classifier", guidance_strength=3.0),
                "hue": ControlConfig(classes=("a", "b")),
            },
        )
    )
    work = home / "work"
    assert config.base_model == str(work / "models" / "mine")
    assert config.data == str(work / "data.parquet")
    assert config.prompts_file == str(home / "prompts.txt")
    assert config.init_adapter == str(home / "runs" / "first" / "adapter")
    assert config.evaluation == EvaluationConfig(prompts_file=str(work / "evaluation.txt"), num_samples=7)
    assert config.controls == {
        "size": ControlConfig(classifier=str(work / "runs" / "classifier"), guidance_strength=3.0),
        "hue": ControlConfig(classes=("a", "b")),
    }
    assert _absolute_paths(config) == config


def test_names_and_addresses_are_no_paths(home: Path) -> None:
    """'shapes' is built in, also where a folder of that name is there; the hub and object stores have their own names."""
    (home / "work" / "shapes").mkdir()
    for config in (
        TrainConfig(base_model="shapes", data="shapes"),
        TrainConfig(base_model="someone/some-model", data="s3://bucket/data.parquet"),
    ):
        assert _absolute_paths(config) == config
    # a folder of that name comes before the hub
    (home / "work" / "someone" / "some-model").mkdir(parents=True)
    found = _absolute_paths(TrainConfig(base_model="someone/some-model"))
    assert found.base_model == str(home / "work" / "someone" / "some-model")
    assert _absolute_paths(TrainConfig(base_model="~/work/models/mine")).base_model == str(home / "work/models/mine")


def test_data_that_are_not_read_are_told() -> None:
    fitted, to_fit = ControlConfig(classifier="/c/jpeg"), ControlConfig(thresholds=(1.0,))
    config = TrainConfig(controls={"jpeg_size": fitted}, data="/d/mine.parquet")
    (line,) = _unread_data(config)
    assert line == (
        "data       /d/mine.parquet: only its prompts are read, no image and no label: there are classifiers already, of "
        "jpeg_size (/c/jpeg); to fit them on the data: --refit-classifier"
    )
    assert "nothing of it is read" in _unread_data(replace(config, prompts_file="p.txt"))[0]
    assert _unread_data(replace(config, controls={"jpeg_size": fitted, "own": to_fit})) == []
    assert _unread_data(replace(config, data="shapes")) == _unread_data(replace(config, data=None)) == []


def test_prompts_beyond_the_text_encoder_are_told() -> None:
    """The example's reads 8 tokens, the marks of start and end among them."""
    backbone = load_backbone("shapes")
    fits, long = "a red circle", "a red circle beside a blue square above a green triangle"
    assert _cut_prompts(backbone, {fits}) == _cut_prompts(backbone, set()) == []
    (line,) = _cut_prompts(backbone, {fits, long})
    assert line == f"prompts    1 of 2 are cut: the text encoder reads 8 tokens; the longest has 25: {long!r}"
