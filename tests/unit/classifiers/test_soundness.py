"""What a classifier's own figures say about it: errors where there is one class, doubts with the figures elsewhere."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from ctrl_ray import embedded
from ctrl_ray.classifiers.calibration import measure_temperature
from ctrl_ray.classifiers.soundness import (
    check_classes,
    class_rows,
    doubts,
    evidence,
    gain_over_commonest,
    warning_lines,
)
from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import DataError

NAMES = ("sun", "rain", "snow")
SIZE = ControlConfig(thresholds=(40000.0, 60000.0), unit="bytes", oracle="jpeg_size")


def figures(**changes: Any) -> dict[str, Any]:
    """Of a good fit: 200 held-out images, 20 of them wrong, every class everywhere."""
    logits = torch.tensor([[2.0, 0.0, 0.0]] * 60 + [[0.0, 2.0, 0.0]] * 70 + [[0.0, 0.0, 2.0]] * 70)
    labels = torch.tensor([0] * 60 + [1] * 60 + [2] * 70 + [0] * 10)
    good = {
        "after": {"accuracy": 0.9},
        "num_rows": {"judged": 200},
        "class_rows": {"all": [700, 600, 700], "fitting": [560, 480, 560], "judged": [70, 60, 70]},
        "commonest": gain_over_commonest(logits, labels),
        "temperature": measure_temperature(logits, labels)._asdict(),
    }
    return good | changes


def test_the_evidence_is_of_all_rows_of_those_to_fit_on_and_of_the_judged() -> None:
    logits, labels = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), torch.tensor([0, 1])
    temperature = measure_temperature(logits, labels)
    found = evidence(torch.tensor([0, 1, 2, 0, 1]), np.array([2, 3]), logits, labels, temperature)
    assert found["class_rows"] == {"all": [2, 2, 1], "fitting": [1, 0, 1], "judged": [1, 1, 0]}
    assert json.loads(json.dumps(found)) == found, "it is kept as JSON"
    assert found["commonest"]["gain"] == 0 and found["temperature"]["num_errors"] == 1


def test_a_good_fit_gives_nothing_to_doubt() -> None:
    assert doubts(NAMES, figures()["temperature"]["best"], figures()) == ()
    assert warning_lines("weather", ["so"]) == ["warning: classifier of weather: so"]


def test_one_class_is_an_error_with_the_numbers_of_the_data() -> None:
    check_classes("size", SIZE, [3, 0, 5], "images", (900.0, 70000.0))
    with pytest.raises(DataError) as error:
        check_classes("size", SIZE, [80, 0, 0], "images", (1000.0, 1079.0))
    for words in ("'size'", "between 1000 and 1079 bytes", "all 80 images are of class '<40000'", "40000, 60000"):
        assert words in str(error.value)
    spec = ControlConfig(classes=("dark", "bright"), column="light")
    with pytest.raises(DataError, match=r"all 7 rows to fit on are of class 'bright'.*column 'light'"):
        check_classes("brightness", spec, [0, 7], "rows to fit on", None)


def test_the_gain_over_the_commonest_answer_by_hand() -> None:
    """Labels 0 0 0 1; right on three rows, among them the 1: gains 0, 0, -1, 1."""
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = gain_over_commonest(logits, torch.tensor([0, 0, 0, 1]))
    assert (found["commonest"], found["share"], found["gain"]) == (0, 0.75, 0.0)
    assert found["standard_error"] == pytest.approx(math.sqrt(0.5) / 2)
    assert class_rows(torch.tensor([0, 0, 2]), 4) == [2, 0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"all": [9, 9, 0], "fitting": [7, 7, 0], "judged": [2, 2, 0]}, ["no row at all (of 18) is of class 'snow'"]),
        (
            {"all": [9, 1, 9], "fitting": [8, 0, 8], "judged": [1, 1, 1]},
            ["no row to fit on (of 16) is of class 'rain'"],
        ),
        (
            {"all": [9, 9, 0], "fitting": [7, 7, 0], "judged": [0, 2, 0]},
            ["no row at all (of 18) is of class 'snow'", "no held-out row (of 2) is of class 'sun'"],
        ),
    ],
)
def test_a_class_without_rows_is_named_once(rows: dict[str, list[int]], expected: list[str]) -> None:
    found = doubts(NAMES, figures()["temperature"]["best"], figures(class_rows=rows))
    assert [doubt.partition(":")[0] for doubt in found] == expected


@pytest.mark.parametrize(("gain", "doubted"), [(0.0, True), (-0.1, True), (0.0599, True), (0.0601, False)])
def test_an_accuracy_must_be_two_standard_errors_above_a_constant_answer(gain: float, doubted: bool) -> None:
    against = {"commonest": 1, "share": 0.84, "gain": gain, "standard_error": 0.03}
    found = doubts(NAMES, figures()["temperature"]["best"], figures(commonest=against))
    assert bool(found) is doubted
    if doubted:
        assert f"accuracy 0.900 on 200 held-out images is not shown to be better than the {0.9 - gain:.3f}" in found[0]
        assert "commonest class 'rain'" in found[0] and f"difference {gain:+.3f}, standard error 0.030" in found[0]


def separated(num_right: int, num_wrong: int) -> dict[str, Any]:
    logits = torch.tensor([[2.0, 0.0, 0.0]] * (num_right + num_wrong))
    return measure_temperature(logits, torch.tensor([0] * num_right + [1] * num_wrong))._asdict()


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((12, 0), "there are no errors on 12 held-out images"),
        ((9, 1), "10 held-out images (1 error) are too few: they only place it between"),
        (
            (60, 120),
            "180 held-out images (120 errors) fit every higher temperature about as well, up to the limit of 148",
        ),
    ],
)
def test_why_a_temperature_is_not_calibrated(rows: tuple[int, int], words: str) -> None:
    [found] = doubts(NAMES, 1.0, figures(temperature=separated(*rows)))
    assert found.startswith("the temperature 1 is not calibrated: ") and words in found


def test_a_folder_of_an_earlier_version_is_doubted_by_what_it_tells() -> None:
    """The shipped one tells accuracy and rows: 10 of 224 wrong, temperature 0.87. Others ran away."""
    shipped = json.loads((embedded.CLASSIFIER / "classifier.json").read_text())
    classes, known = shipped["classes"], shipped["calibration"]
    assert "temperature" not in known and doubts(classes, shipped["temperature"], known) == ()
    for temperature in (0.0067, 0.0096, 0.09, 148.0):
        [found] = doubts(classes, temperature, known)
        assert f"temperature {temperature:.4g} from 224 held-out images, 10 of them wrong, is unreliable" in found
    perfect = known | {"after": known["after"] | {"accuracy": 1.0}}
    assert "0 of them wrong" in doubts(classes, 0.5, perfect)[0]
    guessing = known | {"after": known["after"] | {"accuracy": 0.28}}
    assert "0.250 of guessing among 4 classes" in doubts(classes, 0.9, guessing)[0]
    assert doubts(classes, 1.0, {}) == ()
    assert "does not tell" in doubts(classes, 1.0, {"class_rows": {"all": 3}})[0]
    assert "does not tell" in doubts(classes, 1.0, {"temperature": {"best": "low"}})[0]
