"""The table at the end of a run, and what is said beneath it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctrl_ray import train
from ctrl_ray.config import TrainConfig
from ctrl_ray.evaluation.metric_names import EVALUATION_METRICS
from ctrl_ray.reporting.summary_text import closing_lines, format_summary

NOT_ABOVE = {"before": 0.514, "after": 0.51, "difference": -0.004, "standard_error": 0.021, "above": False}


def _side(**accuracy: float) -> dict[str, Any]:
    """Judged: the accuracy of each control, macro-F1 a hundredth less."""
    mean = sum(accuracy.values()) / len(accuracy)
    controls = {
        name: {"accuracy": value, "macro_f1": value - 0.01, "belief_gap": None} for name, value in accuracy.items()
    }
    numbers = dict.fromkeys(EVALUATION_METRICS) | {
        "accuracy": mean,
        "macro_f1": mean - 0.01,
        "kl": 1.5,
        "num_samples": 512,
    }
    return {**numbers, "joint_accuracy": 0.25, "controls": controls}


CERTIFICATE = {"gap": 2.1, "gap_standard_error": 0.2, "ess": 0.25, "too_wide": False}


def _rows(text: str) -> dict[str, list[str]]:
    """Label to the cells after it."""
    lines = [line.split("  ") for line in text.splitlines()]
    return {cells[0]: [cell.strip() for cell in cells[1:] if cell.strip()] for cells in lines}


def test_one_control_has_one_row_for_each_number_and_the_gap() -> None:
    summary = {"before": _side(size=0.25), "after": {**_side(size=0.875), **CERTIFICATE}, "kl_noise_floor": 0.0062}
    rows = _rows(format_summary(summary))
    assert rows[""] == ["before", "after"]
    assert list(rows)[1:] == ["accuracy", "macro_f1", "kl", "gap", "num_samples"]
    assert rows["accuracy"] == ["0.250", "0.875"]
    assert rows["gap"] == ["–", "2.100 ± 0.200", "(nats from the target)"]
    assert rows["kl"] == ["1.500", "1.500", "(floor 0.0062: less cannot be told from rounding)"]
    assert rows["num_samples"] == ["512", "512"]


def test_several_controls_have_a_row_each_and_the_mean_beside() -> None:
    summary = {"before": _side(size=0.25, colour=0.5), "after": _side(size=0.875, colour=0.5)}
    rows = _rows(format_summary(summary, ("accuracy", "joint_accuracy", "macro_f1")))
    assert {name: cells for name, cells in rows.items() if name.startswith("accuracy")} == {
        "accuracy/size": ["0.250", "0.875"],
        "accuracy/colour": ["0.500", "0.500"],
        "accuracy, mean": ["0.375", "0.688"],
    }
    assert rows["macro_f1/size"] == ["0.240", "0.865"] and rows["joint_accuracy"] == ["0.250", "0.250"]
    widths = {len(line) for line in format_summary(summary, ("accuracy", "kl")).splitlines()}
    assert len(widths) == 1  # columns stand under each other


def test_images_alone_have_no_before_and_no_gap() -> None:
    rows = _rows(format_summary({"after": _side(size=0.875)}))
    assert rows[""] == ["after"] and rows["accuracy"] == ["0.875"] and "gap" not in rows
    assert closing_lines({"after": _side(size=0.875)}) == []


def test_the_end_of_a_run_says_what_was_not_learned_and_what_it_exported(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = {"control": "colour", "class": None, "accuracy": NOT_ABOVE, "log_prob": None}
    after = {**_side(size=0.87, colour=0.51), **CERTIFICATE, "not_learned": [found]}
    summary = {"before": _side(size=0.23, colour=0.514), "after": after, "kl_noise_floor": None, "report": "page.html"}
    (tmp_path / "adapter" / "classes").mkdir(parents=True)
    config = TrainConfig()
    train._print_end(tmp_path, summary, config, "a red circle", 90.0)
    printed = capsys.readouterr().out
    assert "accuracy/size" in printed and "accuracy, mean" in printed and "num_samples" not in printed
    assert "The policy is 2.1 ± 0.2 nats from the best that any sampler can do" in printed
    assert (
        "\ncolour: accuracy 0.510 after, 0.514 before (difference -0.004 ± 0.021): not above the pre-trained model. Try:"
        in (printed)
    )
    assert (
        printed.index("not above")
        < printed.index("report   page.html")
        < printed.index("LoRA files for plain diffusers")
    )
    assert printed.index("time     1.5 minutes") < printed.index("\nnext\n  sample")
