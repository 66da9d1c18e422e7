"""What a checked run says of its classifiers: ready ones, and those that are to be fitted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ctrl_ray import embedded
from ctrl_ray.config import ClassifierConfig, ControlConfig, TrainConfig
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.planning.preflight import _complete, preflight


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, None), ({"temperature": 0.0067}, "temperature 0.0067"), ({"temperature": 148}, "temperature 148")],
)
def test_a_ready_classifier_is_doubted_by_its_own_figures(
    tmp_path: Path, changes: dict[str, float], words: str | None
) -> None:
    file = _copied(tmp_path, **changes)
    doubts: list[str] = []
    control = _complete("jpeg_size", ControlConfig(classifier=str(file.parent)), False, doubts)
    assert control.num_classes == 4
    assert [line.startswith(f"warning: classifier of jpeg_size: the {words}") for line in doubts] == [True] * bool(
        words
    )
    again: list[str] = []
    assert _complete("jpeg_size", control, True, again).classifier is None and again == [], "a new one will be fitted"


BY_PROMPT = "tests.prompt_rules:jpeg_size_by_prompt"


def test_a_ready_classifier_that_does_not_see_the_prompt_is_doubted_where_the_oracle_does() -> None:
    doubts: list[str] = []
    shipped = str(embedded.CLASSIFIER)
    control = _complete("jpeg_size", ControlConfig(classifier=shipped, oracle=BY_PROMPT), False, doubts)
    assert control.oracle == BY_PROMPT
    (line,) = doubts
    assert line.startswith(
        "warning: classifier of jpeg_size: the oracle 'tests.prompt_rules:jpeg_size_by_prompt' judges"
    )


@pytest.mark.parametrize("prompt_conditional", [False, True])
def test_a_classifier_that_will_not_see_the_prompt_is_doubted_before_it_is_fitted(
    tiny_pipeline: Path, prompt_conditional: bool
) -> None:
    config = TrainConfig(
        base_model=str(tiny_pipeline),
        data="shapes",
        controls={"mine": ControlConfig(oracle=BY_PROMPT, thresholds=(3000.0,))},
        classifier=ClassifierConfig(prompt_conditional=prompt_conditional),
    )
    checked = preflight(config)
    assert [line.startswith("warning: classifier of mine: the oracle") for line in checked.doubts] == [True] * (
        not prompt_conditional
    )
    assert ("does not see the prompt" in checked.summary) is not prompt_conditional


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": "warm"}, "temperature is 'warm'"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"thresholds": 5}, "thresholds is 5"),
        ({"classes": [1, 2, 3, 4]}, "classes is"),
        ({"classes": ["a", "b\n", "c", "d"]}, "line break"),
        ({"calibration": 7}, "calibration is 7"),
        ({"network_arguments": []}, "network_arguments is"),
        ({"image_size": None}, "image_size is None"),
    ],
)
def test_a_setting_of_another_type_names_the_classifiers_file(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    file = _copied(tmp_path, **changes)
    with pytest.raises(ModelError, match=message):
        _complete("jpeg_size", ControlConfig(classifier=str(file.parent)), False, [])


def _copied(folder: Path, **changes: object) -> Path:
    """`classifier.json` of the shipped classifier's copy, with these settings changed."""
    shutil.copytree(embedded.CLASSIFIER, folder / "classifier")
    file = folder / "classifier" / "classifier.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


def test_what_stage_1_could_not_fit_is_refused_with_the_plan(tiny_pipeline: Path) -> None:
    control = ControlConfig(classes=("a", "b"))
    config = TrainConfig(base_model=str(tiny_pipeline), data="shapes", controls={"mine": control})
    with pytest.raises(ConfigError, match="data 'shapes' has no labels of control 'mine'"):
        preflight(config)
