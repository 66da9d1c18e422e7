"""A comparison over label budgets as people read it: one table, the ratios of labels, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrl_ray.comparison.budgets import figure
from ctrl_ray.comparison.budgets.lines import LINES
from ctrl_ray.comparison.report import (
    distance_text,
    gap_text,
    list_html,
    made_with,
    number_text,
    share_text,
    table_lines,
    task_text,
    training_text,
)
from ctrl_ray.reporting.markup import ReportFigure, html_page, picture, table, text
from ctrl_ray.wording import text_table

HEAD = (
    *("line", "labelled images", "knob", "accuracy", "fidelity", "distance, worst class", "gap / nats"),
    *("classifier's ECE", "classifier's NLL", "training / s"),
)
"""Columns of the table."""
TERMINAL = HEAD[:7]
"""Columns of what is printed."""


def table_rows(results: Mapping[str, Any]) -> list[list[str]]:
    """A row of cells under HEAD for the pre-trained model, then for each line at each budget."""
    before = results["pre_trained"]
    plain = ["pre-trained", "0", "–", *_numbers(before), "–", "–", "0"]
    return [plain, *(_row(row) for row in results["rows"])]


def _row(row: Mapping[str, Any]) -> list[str]:
    return [
        row["title"],
        str(row["budget"]),
        f"{row['knob']} {row['chosen']:g}",
        *_numbers(row["test"]),
        _calibration(row["calibration"], "ece"),
        _calibration(row["calibration"], "nll"),
        training_text(row["training"]),
    ]


def _numbers(test: Mapping[str, Any]) -> list[str]:
    errors = test["errors"]
    return [
        share_text(test["accuracy"], errors["accuracy"]),
        number_text(test["prompt_fidelity"], errors["prompt_fidelity"], 3),
        distance_text(test["common_distance"]),
        gap_text(test),
    ]


def _calibration(seeds: Sequence[Mapping[str, Any]], name: str) -> str:
    """Mean over seeds, of each control."""
    controls = list(seeds[0]) if seeds else []
    if not controls:
        return "–"
    return ", ".join(f"{sum(seed[control][name] for seed in seeds) / len(seeds):.3f}" for control in controls)


def line_of(row: Mapping[str, Any]) -> str:
    """What a line at a budget came to, for the terminal."""
    test = row["test"]
    accuracy = "" if test["accuracy"] is None else f"accuracy {test['accuracy']:.3f}, "
    distance = distance_text(test["common_distance"])
    return f"{row['title']}, {row['budget']} images: {accuracy}{distance} noise floors in the worst class"


def ratio_lines(results: Mapping[str, Any]) -> list[str]:
    """Of each other line, at each budget of CTRL, how many times as many labels it needs for the same distance."""
    return [
        f"{LINES[line].title}: " + ", ".join(f"{row['budget']}: {ratio_text(row)}" for row in rows)
        for line, rows in results["ratios"].items()
    ]


def ratio_text(row: Mapping[str, Any]) -> str:
    """'> 16 ×' where no seed's curve came as near; else the median with the extremes."""
    bounds = row["bounds"]
    if all(bound == ">" for bound in bounds):
        return f"> {row['low']:.3g} ×"
    sign = {">": "≥ ", "<=": "≤ "}
    kinds = {bound for bound in bounds if bound != "="}
    mark = sign[kinds.pop()] if len(kinds) == 1 else "about " if kinds else ""
    return f"{mark}{row['ratio']:.3g} × ({row['low']:.3g} to {row['high']:.3g})"


def title_of(results: Mapping[str, Any]) -> str:
    """What was compared."""
    return f"Label budgets on {task_text(results)}"


def notes(results: Mapping[str, Any]) -> list[str]:
    """What stands under the table."""
    return [
        "every classifier is fitted on so many labelled images, its three splits inside of them; CFG fine-tuning sees the same "
        "images and labels; each seed draws other ones",
        "distance: to exact samples of the target that a classifier on all labelled images gives, over the noise floor of as "
        f"many exact samples; {results['common_test']} images, mean over {results['num_seeds']} seeds (range; "
        "without one: one seed)",
        f"knobs: chosen for each line and budget by the {results['criterion']}",
        "ECE and NLL: of the classifier, on samples of the pre-trained model",
        made_with(results),
    ]


RATIOS = "How many times CTRL's labels another method needs for the same distance, at CTRL's budgets"


def markdown(results: Mapping[str, Any]) -> str:
    """The whole comparison as Markdown."""
    lines = [f"# {title_of(results)}", "", *table_lines(HEAD, table_rows(results)), ""]
    lines += [f"- {line}" for line in notes(results)]
    if ratios := ratio_lines(results):
        lines += ["", f"## {RATIOS}", "", *(f"- {line}" for line in ratios)]
    for kind, file in results["figures"].items():
        lines += ["", f"![{kind}]({file})"]
    return "\n".join(lines) + "\n"


def terminal_text(results: Mapping[str, Any]) -> str:
    """The columns that a terminal has room for, and the ratios."""
    rows = [row[: len(TERMINAL)] for row in [list(HEAD), *table_rows(results)]]
    found = text_table(rows, left=(0, 2))
    ratios = ratio_lines(results)
    return "\n".join([found, *([f"\n{RATIOS}:", *ratios] if ratios else [])])


def page(results: Mapping[str, Any], folder: Path) -> str:
    """The same as one HTML file, with the picture inside."""
    cells = [[text(cell) for cell in row] for row in table_rows(results)]
    ratios = ratio_lines(results)
    sections = [
        f"<h1>{text(title_of(results))}</h1>",
        *(
            picture(ReportFigure(kind, figure.CAPTION, folder / file, wide=True))
            for kind, file in results["figures"].items()
        ),
        f"<h2>{text(RATIOS)}</h2>{list_html(ratios)}" if ratios else "",
        "<h2>Every line at every budget</h2>",
        table(cells, HEAD),
        list_html(notes(results)),
        "<h2>Made with</h2>",
        table([(text(key), text(value)) for key, value in results["facts"].items()]),
    ]
    return html_page(title_of(results), sections)
