"""A whole comparison on a tiny pipeline: training, choice of knobs, test, costs, report; asked again, nothing is drawn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ctrl_ray.compare import CompareOptions, compare
from ctrl_ray.comparison import bench, drawing, plan
from ctrl_ray.comparison.budgets import lines
from ctrl_ray.comparison.budgets import run as budget_run
from ctrl_ray.comparison.plan import Budget, Counts
from ctrl_ray.config import TrainConfig
from ctrl_ray.config.presets import PRESETS

pytestmark = [pytest.mark.integration, pytest.mark.full]

TINY = Budget(cheap=Counts(64, 64), dear=Counts(64, 64), with_dear=False, held_out=False, timing_s=1.0)


@pytest.fixture
def options(base_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CompareOptions:
    """CTRL and best of N on two prompts, at an exponent that leaves enough exact samples."""
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    control = dataclasses.replace(base_config.controls["jpeg_size"], guidance_strength=1.0)
    preset = dataclasses.replace(
        base_config,
        controls={"jpeg_size": control},
        prompts_file=str(tmp_path / "prompts.txt"),
        evaluation=dataclasses.replace(base_config.evaluation, batch_size=64),
    )
    monkeypatch.setitem(PRESETS, "tiny", lambda: preset)
    monkeypatch.setattr(plan, "QUICK", TINY)
    return CompareOptions(
        preset="tiny",
        quick=True,
        methods=("ctrl", "best_of_n"),
        classifier=(f"jpeg_size={control.classifier}",),
        output_dir=str(tmp_path / "out"),
    )


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """Without what names the time of a session."""
    return {key: value for key, value in results.items() if key not in ("seconds", "facts")}


def test_a_comparison_end_to_end_and_again(options: CompareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    results = compare(options)
    folder = Path(options.output_dir)
    by_name = {row["name"]: row for row in results["methods"]}
    assert list(by_name) == ["plain", "ctrl", "best_of_n"]
    for row in by_name.values():
        assert row["test"]["num_images"] == 64
        assert row["cost"]["seconds"] > 0
        assert set(row["test"]["distance"]["classes"]) == set(results["pool"]["exact"])
    assert by_name["plain"]["test"]["kl"] == 0.0
    assert by_name["plain"]["cost"]["calls"] == {
        "calls": 3,
        "forwards": 3.0,
        "backwards": 0.0,
        "decodes": 1.0,
        "decode_backwards": 0.0,
    }
    best = by_name["best_of_n"]
    count = best["chosen"]
    assert [found["value"] for found in best["validation"]] == [4.0, 8.0, 2.0] and count in (4.0, 8.0, 2.0)
    calls = best["cost"]["calls"]
    assert (calls["forwards"], calls["decodes"]) == (3 * count, count + 1)
    assert best["test"]["kl"] is None and best["test"]["gap"] is None
    ctrl = by_name["ctrl"]
    assert ctrl["test"]["kl"] > 0 and ctrl["test"]["gap"] is not None
    assert ctrl["cost_mixed"]["ratio"] > 0 and best["cost_mixed"] is None
    assert ctrl["training"][0]["whole"] and ctrl["training"][0]["seconds"] > 0
    assert len(results["verdicts"]) == 3 and results["classifiers"] == {}
    for name in ("report.html", "report.md", *results["figures"].values()):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "results.json").read_text()) == results

    for place in (drawing, bench):
        for name in ("sample_policy", "sampling_task", "fit_classifier"):
            monkeypatch.setattr(place, name, lambda *_: pytest.fail("drawn again"), raising=False)
    monkeypatch.setattr("ctrl_ray.verification.drawing.sample_policy", lambda *_: pytest.fail("drawn again"))
    monkeypatch.setattr("ctrl_ray.train.fit", lambda *_, **__: pytest.fail("trained again"))
    assert numbers(compare(options)) == numbers(results)


def test_label_budgets_end_to_end_and_again(options: CompareOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier on so many images, a run and a noised classifier of each, one report; asked again, nothing is fitted."""
    monkeypatch.setattr(lines, "QUICK", Counts(64, 64))
    monkeypatch.setattr(lines, "FEWEST_UPDATES", 2)
    asked = dataclasses.replace(options, methods=(), label_budgets=(24,))
    results = compare(asked)
    assert [(row["line"], row["budget"]) for row in results["rows"]] == [("ctrl", 24), ("cfg", 24), ("guidance", 24)]
    folder = Path(asked.folder)
    for row in results["rows"]:
        assert row["test"]["num_images"] == 64 and len(row["validation"]) == 3
        assert bool(row["calibration"][0]) == (row["line"] == "ctrl")
    fitted = json.loads((folder / "classifiers" / "pairs-0-24-0" / "jpeg_size" / "classifier.json").read_text())
    rows = fitted["calibration"]["num_rows"]
    assert sum(rows[split] for split in ("fitting", "selection", "temperature")) == 24
    assert (folder / "label_budgets.png").stat().st_size > 0
    assert set(results["ratios"]) == {"cfg", "guidance"}
    monkeypatch.setattr(budget_run, "fit_classifier", None)
    monkeypatch.setattr(drawing, "sample_policy", None)
    assert numbers(compare(asked)) == numbers(results)
