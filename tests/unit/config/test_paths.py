"""Paths of a config, which workers read from another working directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctrl_ray.config import ControlConfig, EvaluationConfig, TrainConfig
from ctrl_ray.config.paths import absolute_path, absolute_paths
from ctrl_ray.errors import ConfigError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home folder; the working directory is `work` in it."""
    (tmp_path / "work" / "models" / "mine").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_no_relative_path_reaches_a_worker(home: Path) -> None:
    config = absolute_paths(
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
    assert absolute_paths(config) == config


def test_names_and_addresses_are_no_paths(home: Path) -> None:
    """'shapes' is built in, also where a folder of that name is there; the hub and object stores have their own names."""
    (home / "work" / "shapes").mkdir()
    for config in (
        TrainConfig(base_model="shapes", data="shapes"),
        TrainConfig(base_model="someone/some-model", data="s3://bucket/data.parquet"),
    ):
        assert absolute_paths(config) == config
    # a folder of that name comes before the hub
    (home / "work" / "someone" / "some-model").mkdir(parents=True)
    found = absolute_paths(TrainConfig(base_model="someone/some-model"))
    assert found.base_model == str(home / "work" / "someone" / "some-model")
    assert absolute_paths(TrainConfig(base_model="~/work/models/mine")).base_model == str(home / "work/models/mine")


@pytest.mark.parametrize("path", ["~nobody-of-this-name/data.parquet", "data\0.parquet"])
def test_what_is_no_path_is_said(path: str) -> None:
    """An unknown user, and a sign that no path has."""
    with pytest.raises(ConfigError, match=r"is no path .*expected the path of a file or folder"):
        absolute_path(path)


def test_links_in_a_circle_are_no_path(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ConfigError, match="is no path"):
        absolute_path(str(tmp_path / "a" / "data.parquet"))
