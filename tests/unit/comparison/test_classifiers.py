"""The classifiers of a comparison: offline only, fitted once, or taken; how far two differ."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctrl_ray.comparison import classifiers
from ctrl_ray.comparison.classifiers import (
    classifier_difference,
    given_classifiers,
    offline_classifiers,
    shipped_classifiers,
    with_classifiers,
)
from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.config.presets import preset
from ctrl_ray.errors import ConfigError


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(control, samples of the pipeline) of each fit, which writes what a fit does."""
    done: list[tuple[str, int]] = []

    def fit(config: TrainConfig, name: str, *, output_dir: Path, **_: Any) -> None:
        done.append((name, config.classifier.num_pipeline_samples))
        output_dir.mkdir(parents=True)
        (output_dir / "classifier.json").write_text("{}")

    monkeypatch.setattr(classifiers, "fit_classifier", fit)
    return done


def test_they_are_fitted_on_labelled_images_alone_and_once(tmp_path: Path, fits: list[tuple[str, int]]) -> None:
    """The preset's own are fitted on samples of the pipeline besides."""
    config = preset("shapes-two-controls")
    assert config.classifier.num_pipeline_samples > 0
    folders = [offline_classifiers(config, tmp_path, {}) for _ in range(2)]
    assert fits == [("jpeg_size", 0), ("colourfulness", 0)]
    assert folders[0] == folders[1] == {name: str(tmp_path / name) for name in config.controls}


def test_a_given_one_is_taken(tmp_path: Path, fits: list[tuple[str, int]]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "classifier.json").write_text("{}")
    given = given_classifiers(preset("shapes"), {"jpeg_size": str(tmp_path / "mine")})
    found = offline_classifiers(preset("shapes"), tmp_path, given)
    assert found == {"jpeg_size": str(tmp_path / "mine")} and fits == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"jpeg": "x"}, "--classifier names ['jpeg']; the preset has the controls ['jpeg_size']"),
        ({"jpeg_size": "nowhere"}, "--classifier jpeg_size=nowhere holds no classifier.json; expected a folder"),
    ],
)
def test_one_that_is_not_there_is_an_error(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        given_classifiers(preset("shapes"), given)
    assert message in str(raised.value)


def test_a_run_gets_the_comparisons_classifiers() -> None:
    config = with_classifiers(preset("shapes"), {"jpeg_size": "/own"})
    assert config.controls["jpeg_size"].classifier == "/own"
    assert shipped_classifiers(config) == {"jpeg_size": "/own"}
    assert shipped_classifiers(preset("shapes-two-controls")) == {}  # one of them ships with none


def test_the_difference_of_two_classifiers_by_hand() -> None:
    """Two images of two classes: the one agrees, the other moves 0.3 of its mass."""
    control = dataclasses.replace(ControlConfig(), classes=("low", "high"))
    own = np.log(np.array([[0.8, 0.2], [0.4, 0.6]]))
    shipped = np.log(np.array([[0.8, 0.2], [0.7, 0.3]]))
    found = classifier_difference(own, shipped, np.array([0, 1]), control, 2.0)
    assert found["num_images"] == 2 and found["total_variation"] == pytest.approx(0.15)
    assert found["own"]["log_z"]["low"] == pytest.approx(np.log((0.64 + 0.16) / 2))
    assert found["shipped"]["log_z"]["high"] == pytest.approx(np.log((0.04 + 0.09) / 2))
    assert (found["own"]["accuracy"], found["shipped"]["accuracy"]) == (1.0, 0.5)
    assert found["own"]["nll"] == pytest.approx(-np.log([0.8, 0.6]).mean())
    assert "accuracy" not in classifier_difference(own, shipped, None, control, 2.0)["own"]
