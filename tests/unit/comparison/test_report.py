"""The table and the words of a comparison's report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ctrl_ray.comparison.report import CAPTIONS, HEAD, markdown, page, table_rows, terminal_text
from ctrl_ray.comparison.results import CRITERION, verdicts
from tests.unit.comparison.rows import row


def results(*methods: dict[str, Any], **changes: Any) -> dict[str, Any]:
    found = {
        "preset": "shapes",
        "command": "python -m ctrl_ray.compare --quick",
        "exponents": {"jpeg_size": 4.0},
        "criterion": CRITERION,
        "num_values": 3,
        "common_test": 128,
        "batch_size": 16,
        "runs_at_a_time": 2,
        "seed": 0,
        "pool": {"samples": 672, "exact": {"small": 170, "large": 148}},
        "classifiers": {},
        "methods": list(methods),
        "held_out": None,
        "windows": [],
        "verdicts": verdicts(methods),
        "facts": {"processor": "two cores", "written": "2026-01-01 10:00 UTC"},
        "seconds": 612.0,
        "figures": {},
    }
    return found | changes


def cells(method: dict[str, Any]) -> dict[str, str]:
    (found,) = table_rows([method])
    return dict(zip(HEAD, found, strict=True))


def test_a_method_has_every_number_with_its_interval() -> None:
    assert cells(row("dps", ratio=8.0, worst=2.5)) == {
        "method": "dps",
        "knob": "scale 2",
        "accuracy": "0.800 [0.780, 0.820]",
        "macro-F1": "0.750 [0.730, 0.770]",
        "fidelity": "0.900 ± 0.010",
        "diversity": "0.200 ± 0.010",
        "distance, worst class": "2.50",
        "distance by class": "2.5 1.2",
        "path KL / nats": "1.50 ± 0.01",
        "gap / nats": "0.40 ± 0.01",
        "s an image": "0.16",
        "× plain": "8.00",
        "forwards": "10",
        "backwards": "0",
        "decodes": "1",
        "decode backwards": "0",
        "training / s": "0",
        "images": "128",
    }


def test_what_is_not_known_is_a_dash() -> None:
    found = cells(row("smc", worst=None, accuracy=None, macro_f1=None, kl=None, gap=None, too_wide=None))
    names = ("accuracy", "macro-F1", "distance, worst class", "path KL / nats", "gap / nats")
    assert [found[name] for name in names] == ["–"] * 5
    assert found["distance by class"] == "– –"


def test_a_gap_that_says_too_little_is_loose_and_a_range_over_seeds_is_told() -> None:
    method = row("ctrl", too_wide=True)
    method["test"]["common_distance"] = {**method["test"]["common_distance"], "range": [1.5, 2.5]}
    found = cells(method)
    assert found["gap / nats"] == "0.40 ± 0.01 (loose)"
    assert found["distance, worst class"] == "2.00 (1.50 to 2.50)"


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        (None, "0"),
        ([], "given"),
        ([{"seconds": 100.0, "whole": True}, {"seconds": 201.0, "whole": True}], "150"),
        ([{"seconds": 100.0, "whole": True}, {"seconds": 40.0, "whole": False}], "≥ 70"),
    ],
)
def test_training_is_the_mean_of_the_runs(runs: Any, words: str) -> None:
    assert cells({**row("ctrl"), "training": runs})["training / s"] == words


def test_the_report_tells_how_it_was_made_and_where_ctrl_loses() -> None:
    text = markdown(results(row("plain", worst=20.0), row("ctrl", worst=2.0), row("near", worst=1.0)))
    assert text.startswith("# 3 methods on shapes (jpeg_size λ = 4)\n")
    assert "| CTRL | scale 2 | 0.800 [0.780, 0.820] |" in text
    assert "- loses: smallest distance to the target of all methods at ≤ 1.1 × plain sampling. CTRL is at 2.00" in text
    assert "`python -m ctrl_ray.compare --quick` on two cores, 2026-01-01 10:00 UTC, in 10 m 12 s" in text
    assert "672 pre-trained samples gave 170 of small, 148 of large" in text


def test_without_ctrl_nobody_wins() -> None:
    text = markdown(results(row("plain"), row("dps")))
    assert "wins" not in text and "loses" not in text


def test_the_knobs_values_are_listed_with_the_chosen_one() -> None:
    method = {**row("dps"), "validation": [{"value": 1.0, "worst": None}, {"value": 2.0, "worst": 1.234}]}
    assert "- dps (scale): 1: –, 2: 1.23 (chosen)" in markdown(results(row("plain"), method))


def test_the_windows_are_listed_by_where_they_begin() -> None:
    starts = [
        {"start": 0.0, "accuracy": 0.82, "error": 0.02, "worst": 9.4},
        {"start": 0.4, "accuracy": 0.5, "error": 0.02, "worst": None},
    ]
    text = markdown(results(row("plain"), windows=[{"name": "dps", "title": "DPS", "starts": starts}]))
    assert "DPS: from 0% of the steps on 0.820, 9.40 floors; from 40% of the steps on 0.500, – floors" in text
    assert "When the push begins later" not in markdown(results(row("plain")))


def test_scores_are_listed_where_they_were_measured() -> None:
    scored = row("ctrl", clip_score=0.2714, brisque=23.5, errors={"clip_score": 0.002, "brisque": None})
    text = markdown(results(row("plain"), scored))
    assert "- CTRL: clip score 0.271 ± 0.002, brisque 23.500" in text.splitlines()
    assert "pre-trained: " not in text
    assert "Scores of the images" not in markdown(results(row("plain")))


def test_classifiers_and_held_out_prompts_have_their_sections() -> None:
    side = {"log_z": {"small": -1.5}, "accuracy": 0.96, "nll": 0.07, "ece": 0.02, "brier": 0.1}
    shipped = {**side, "log_z": {"small": -1.25}, "accuracy": 0.97}
    classifiers = {"jpeg_size": {"num_images": 128, "total_variation": 0.02, "own": side, "shipped": shipped}}
    test = row("ctrl")["test"]
    held_out = {"prompts": ["a red cross"], "held_out": {**test, "accuracy": 0.7}, "trained": test}
    text = markdown(results(row("plain"), classifiers=classifiers, held_out=held_out))
    assert "differ by 0.020 in total variation; accuracy 0.960 (own) and 0.970 (shipped)" in text
    assert text.count("log Z small -1.50 and -1.25") == 1
    assert (
        "- held back: accuracy 0.700 [0.680, 0.720], gap 0.40 ± 0.01 nats, fidelity 0.900 ± 0.010 (128 images)" in text
    )
    assert "- trained on: accuracy 0.800" in text


def test_several_controls_have_a_table_of_their_own(tmp_path: Path) -> None:
    """All right, each control, and the gap of each joint class; not where there is one control."""
    both = row(
        "ctrl",
        joint_accuracy=0.64,
        control_accuracies={"size": 0.86, "hue": None},
        class_gaps={"small": 9.6, "large": 12.0},
        errors={"joint_accuracy": 0.01},
    )
    written = markdown(results(both))
    assert "| method | all right | size right | hue right |" in written
    assert "| CTRL | 0.640 [0.620, 0.660] | 0.860 | – |" in written
    assert "| joint class | CTRL |" in written and "| small | 9.6 |" in written and "| large | 12.0 |" in written
    shown = page(results(both), tmp_path)
    assert "Each control, and all of them" in shown and "Nats from the target, of each joint class" in shown
    one = row("ctrl", joint_accuracy=None, control_accuracies={"size": 0.86}, class_gaps={"small": 9.6, "large": 12.0})
    assert "Each control, and all of them" not in markdown(results(one)) + page(results(one), tmp_path)


def test_what_is_printed_has_the_columns_of_a_terminal() -> None:
    lines = terminal_text(results(row("plain", worst=20.0), row("ctrl", worst=2.0))).splitlines()
    assert lines[0].split("  ")[0] == "method" and lines[2].split()[:3] == ["CTRL", "scale", "2"]
    assert "forwards" not in lines[0]
    assert [line.split(":")[0] for line in lines[3:]] == ["wins", "wins", "wins"]


def test_the_page_holds_the_same_with_its_pictures_inside(tmp_path: Path) -> None:
    """Texts are escaped; there is no address outside."""
    title = next(iter(CAPTIONS))
    Image.new("RGB", (4, 4)).save(tmp_path / "accuracy.png")
    found = results(row("plain"), {**row("ctrl"), "title": "<CTRL>"}, figures={title: "accuracy.png"})
    text = page(found, tmp_path)
    assert "&lt;CTRL&gt;" in text and "<CTRL>" not in text
    assert text.count("data:image/png;base64,") == 1 and title in text
    assert all(f"<th>{name}</th>" in text for name in HEAD)
    assert "http" not in text.replace("http-equiv", "")
