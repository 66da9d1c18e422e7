"""Both comparisons on a tiny pipeline: training, choice of knobs, test, costs, report; asked again, nothing is drawn.

That over label budgets trains, and the other takes its adapter.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
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
Asked = tuple[CompareOptions, dict[str, Any]]
"""A question and what it came to."""


@pytest.fixture(scope="module")
def options(base_config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompareOptions]:
    """Two prompts, and an exponent that leaves enough exact samples."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n")
    control = dataclasses.replace(base_config.controls["jpeg_size"], guidance_strength=1.0)
    preset = dataclasses.replace(
        base_config,
        controls={"jpeg_size": control},
        prompts_file=str(folder / "prompts.txt"),
        evaluation=dataclasses.replace(base_config.evaluation, batch_size=64),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", lambda: preset)
        patch.setattr(plan, "QUICK", TINY)
        patch.setattr(lines, "QUICK", Counts(64, 64))
        patch.setattr(lines, "FEWEST_UPDATES", 2)
        for name in set(lines.LINES) - {"ctrl", "guidance"}:
            patch.delitem(lines.LINES, name)
        yield CompareOptions(
            preset="tiny",
            quick=True,
            classifier=(f"jpeg_size={control.classifier}",),
            output_dir=str(folder / "out"),
        )


@pytest.fixture(scope="module")
def over_budgets(options: CompareOptions) -> Asked:
    """One budget of 24 images; CFG fine-tuning's run is tested in test_train.py."""
    asked = dataclasses.replace(
        options,
        label_budgets=(24,),
        methods=("ctrl", "classifier_guidance"),
        output_dir=f"{options.output_dir}-budgets",
    )
    return asked, compare(asked)


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """Without what names the time of a session."""
    return {key: value for key, value in results.items() if key not in ("seconds", "facts")}


def test_label_budgets_end_to_end_and_again(over_budgets: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """A classifier on so many images, a run and a noised classifier of each, one report; asked again, nothing is fitted, and a
    folder that has the rows alone gets the same report."""
    asked, results = over_budgets
    assert [(row["line"], row["budget"]) for row in results["rows"]] == [("ctrl", 24), ("guidance", 24)]
    folder = Path(asked.folder)
    for row in results["rows"]:
        assert row["test"]["num_images"] == 64 and len(row["validation"]) == 3
        assert bool(row["calibration"][0]) == (row["line"] == "ctrl")
        assert row["training"][0]["whole"] and row["training"][0]["seconds"] > 0
    fitted = json.loads((folder / "classifiers" / "pairs-0-24-0" / "jpeg_size" / "classifier.json").read_text())
    rows = fitted["calibration"]["num_rows"]
    assert sum(rows[split] for split in ("fitting", "selection", "temperature")) == 24
    assert (folder / "label_budgets.png").stat().st_size > 0
    assert set(results["ratios"]) == {"guidance"}
    kept = folder / "rows"
    elsewhere = dataclasses.replace(asked, output_dir=f"{asked.output_dir}-elsewhere")
    shutil.copytree(kept, Path(elsewhere.folder) / "rows")
    shutil.rmtree(kept)
    monkeypatch.setattr(budget_run, "fit_classifier", None)
    monkeypatch.setattr("ctrl_ray.train.fit", lambda *_, **__: pytest.fail("trained again"))
    assert numbers(compare(elsewhere)) == numbers(results)
    monkeypatch.setattr(drawing, "sample_policy", None)
    assert numbers(compare(asked)) == numbers(results)
    assert len(list(kept.iterdir())) == 2


def test_a_comparison_end_to_end_and_again(
    options: CompareOptions, over_budgets: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CTRL and best of N."""
    adapter = Path(over_budgets[0].folder) / "runs" / "ctrl-24-0" / "adapter"
    asked = dataclasses.replace(options, methods=("ctrl", "best_of_n"), adapters=(f"ctrl={adapter}",))
    results = compare(asked)
    folder = Path(asked.folder)
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
    assert ctrl["training"] == [] and ctrl["trained"], "where it was trained is not known here"
    assert len(results["verdicts"]) == 3 and results["classifiers"] == {}
    for name in ("report.html", "report.md", *results["figures"].values()):
        assert (folder / name).stat().st_size > 0
    assert json.loads((folder / "results.json").read_text()) == results

    for place in (drawing, bench):
        for name in ("sample_policy", "sampling_task", "fit_classifier"):
            monkeypatch.setattr(place, name, lambda *_: pytest.fail("drawn again"), raising=False)
    monkeypatch.setattr("ctrl_ray.verification.drawing.sample_policy", lambda *_: pytest.fail("drawn again"))
    assert numbers(compare(asked)) == numbers(results)
