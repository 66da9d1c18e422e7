"""Table, ratios, page and picture of a comparison over label budgets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from ctrl_ray.comparison.budgets.figure import TITLE, plot_budgets
from ctrl_ray.comparison.budgets.lines import LINES
from ctrl_ray.comparison.budgets.report import HEAD, markdown, page, ratio_text, table_rows, terminal_text
from ctrl_ray.comparison.results import CRITERION, over_seeds
from ctrl_ray.reporting.markup import text
from tests.unit.comparison.rows import row

BUDGETS = (64, 256)


def line(name: str, budget: int, accuracies: tuple[float, ...], worst: tuple[float, ...]) -> dict[str, Any]:
    """A row of two seeds."""
    seeds = [row("x", accuracy=a, worst=w)["test"] for a, w in zip(accuracies, worst, strict=True)]
    has_classifier = LINES[name].method == "ctrl"
    return {
        "line": name,
        "title": LINES[name].title,
        "budget": budget,
        "knob": "scale",
        "chosen": 1.0,
        "validation": [],
        "test": over_seeds(seeds),
        "seeds": seeds,
        "calibration": [{"size": {"ece": 0.1 + 0.1 * seed, "nll": 0.5}} for seed in range(2)]
        if has_classifier
        else [{}, {}],
        "training": [{"seconds": 100.0, "whole": True, "adapter": "/a"}],
    }


def results(**changes: Any) -> dict[str, Any]:
    rows = [
        line("ctrl", 64, (0.5, 0.7), (6.0, 4.0)),
        line("ctrl", 256, (0.8, 0.8), (3.0, 3.0)),
        line("cfg", 64, (0.3, 0.3), (20.0, 20.0)),
        line("cfg", 256, (0.4, 0.6), (10.0, 8.0)),
    ]
    found = {
        "preset": "shapes",
        "command": "python -m ctrl_ray.compare --label-budgets 64 256",
        "exponents": {"size": 4.0},
        "criterion": CRITERION,
        "budgets": list(BUDGETS),
        "num_seeds": 2,
        "common_test": 256,
        "seed": 0,
        "pre_trained": over_seeds([row("plain", accuracy=0.25, worst=40.0)["test"]]),
        "rows": rows,
        "ratios": {"cfg": [{"budget": 64, "ratio": 4.0, "low": 4.0, "high": 4.0, "bounds": [">", ">"]}]},
        "facts": {"processor": "two cores", "written": "2026-01-01 10:00 UTC"},
        "seconds": 612.0,
        "figures": {},
    }
    return found | changes


def test_each_line_has_its_budget_its_numbers_and_its_classifiers_figures() -> None:
    rows = [dict(zip(HEAD, cells, strict=True)) for cells in table_rows(results())]
    assert [found["line"] for found in rows] == [
        "pre-trained",
        *[LINES[name].title for name in ("ctrl", "ctrl", "cfg", "cfg")],
    ]
    assert rows[1] == {
        "line": "CTRL, pairs (x, y)",
        "labelled images": "64",
        "knob": "scale 1",
        "accuracy": "0.600 [0.404, 0.796]",  # two seeds differ by .2: a standard error of .1
        "fidelity": "0.900 ± 0.007",
        "distance, worst class": "5.00 (4.00 to 6.00)",
        "gap / nats": "0.40 ± 0.01",
        "classifier's ECE": "0.150",
        "classifier's NLL": "0.500",
        "training / s": "100",
    }
    assert rows[3]["classifier's ECE"] == "–"


@pytest.mark.parametrize(
    ("bounds", "shown"),
    [
        (["=", "="], "4 × (2 to 8)"),
        ([">", ">"], "> 2 ×"),
        (["=", ">"], "≥ 4 × (2 to 8)"),
        (["=", "<="], "≤ 4 × (2 to 8)"),
        ([">", "<="], "about 4 × (2 to 8)"),
    ],
)
def test_a_ratio_says_where_it_is_a_bound(bounds: list[str], shown: str) -> None:
    assert ratio_text({"ratio": 4.0, "low": 2.0, "high": 8.0, "bounds": bounds}) == shown


def test_markdown_page_and_terminal_say_the_same(tmp_path: Path) -> None:
    found = results()
    picture = plot_budgets(tmp_path / "label_budgets.png", found)
    assert picture is not None
    found["figures"] = {TITLE: picture.name}
    pages = markdown(found), page(found, tmp_path)
    for word in ("Label budgets on shapes (size λ = 4)", "CFG fine-tuning, with prompts: 64: > 4 ×", found["command"]):
        assert word in pages[0] and text(word) in pages[1]
    assert "![" in pages[0] and "data:image/png;base64," in pages[1]
    shown = terminal_text(found)
    assert "5.00 (4.00 to 6.00)" in shown and "> 4 ×" in shown
    assert "How many times" not in terminal_text(results(ratios={}))


def test_the_picture_has_means_bands_and_the_pre_trained_model(tmp_path: Path, figures: dict[str, Figure]) -> None:
    plot_budgets(tmp_path / "label_budgets.png", results())
    accuracy, distance = figures["label_budgets.png"].axes
    curves = {curve.get_label(): [float(y) for y in curve.get_ydata()] for curve in accuracy.lines}
    assert curves[LINES["ctrl"].title] == pytest.approx([0.6, 0.8])
    assert curves[LINES["cfg"].title] == pytest.approx([0.3, 0.5])
    assert [0.25, 0.25] in [list(line.get_ydata()) for line in accuracy.lines]
    (band, _) = distance.collections
    assert {float(y) for y in band.get_paths()[0].vertices[:, 1]} >= {4.0, 6.0, 3.0}
    assert distance.get_yscale() == distance.get_xscale() == "log"
    assert [label.get_text() for label in distance.get_xticklabels()] == ["64", "256"]


def test_what_is_not_known_is_no_panel(tmp_path: Path, figures: dict[str, Figure]) -> None:
    rows = [{**part, "seeds": [{**seed, "accuracy": None} for seed in part["seeds"]]} for part in results()["rows"]]
    plot_budgets(tmp_path / "one.png", results(rows=rows))
    (axis,) = figures["one.png"].axes
    assert axis.get_ylabel().startswith("distance")
    for part in rows:
        for seed in part["seeds"]:
            seed["common_distance"] = {**seed["common_distance"], "worst": None}
    assert plot_budgets(tmp_path / "none.png", results(rows=rows)) is None
