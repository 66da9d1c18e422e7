"""The end of a run: `summary.json`, the pictures, and one page that shows them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.config.json import to_json
from ctrl_ray.reporting import curves, figures
from ctrl_ray.reporting.distance import distance_rows, plot_distance
from ctrl_ray.reporting.facts import environment_facts
from ctrl_ray.reporting.markup import ReportFigure
from ctrl_ray.reporting.page import Source, render_page
from ctrl_ray.reporting.pictures import described, of_stage_1, picture_file
from ctrl_ray.reporting.sample_grid import GridLine, plot_sample_grid
from ctrl_ray.reporting.summary import Evaluation, make_summary
from ctrl_ray.wording import measured_text

REPORT = "report"
"""Its folder within a run's."""
SUMMARY_FILE, PAGE_FILE = "summary.json", "report.html"
_COLUMNS = 8


def write_report(
    folder: str | Path,
    *,
    controls: Mapping[str, ControlConfig],
    after: Evaluation,
    before: Evaluation | None = None,
    config: TrainConfig | None = None,
    metrics_rows: Sequence[Mapping[str, Any]] = (),
    classifier_figures: Mapping[str, Path] | None = None,
    facts: Mapping[str, str] | None = None,
    adapter: str = "RUN/adapter",
    images_per_class: int = _COLUMNS,
    kl_noise_floor: float | None = None,
    certificate: Mapping[str, Any] | None = None,
    source: Source | None = None,
) -> Path:
    """Write `summary.json`, the PNGs and `report.html` into `folder`, and return the page's path.

    Args:
        folder: Made when missing; files of an earlier report are replaced.
        controls: Name to settings, in the order of the labels' columns.
        after: The policy's evaluation.
        before: The pre-trained model's, on the same prompts and noise; None: not measured (PNGs alone).
        config: Settings of the run, shown in full.
        metrics_rows: Rows of `metrics.jsonl`, for the curves.
        classifier_figures: Title to an existing PNG of stage 1, such as its reliability diagram.
        facts: What else to tell, such as wall-clock times; added to `environment_facts`.
        adapter: Where the adapter lies, for the command that samples from it.
        images_per_class: Samples shown of each class.
        kl_noise_floor: Below which a KL cannot be told from rounding, in nats; shown beside the KL.
        certificate: `certify_evaluation` of the two; becomes part of the summary's `after`.
        source: How more samples are made, where no adapter makes them.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    source = source or Source.of_adapter(adapter)
    summary = make_summary(
        before,
        after,
        kl_noise_floor,
        certificate,
        source.method,
        "ctrl" if config is None else config.training_method,
    )
    (root / SUMMARY_FILE).write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    pictures = draw_figures(root, controls, before, after, metrics_rows, images_per_class, summary["after"])
    pictures += of_stage_1(classifier_figures or {})
    page = render_page(
        summary,
        pictures,
        controls=controls,
        prompt=after.samples.prompts[0] if len(after.samples) else "PROMPT",
        source=source,
        facts={**run_facts(metrics_rows), **(facts or {}), **environment_facts()},
        config_json=None if config is None else to_json(config),
        sampler=None if config is None else config.sampler,
    )
    path = root / PAGE_FILE
    path.write_text(page, encoding="utf-8")
    return path


def report_pictures(folder: str | Path) -> dict[str, Path]:
    """The PNGs that `write_report` left in `folder`, by name."""
    return {path.stem: path for path in sorted(Path(folder).glob("*.png"))}


def draw_figures(
    folder: Path,
    controls: Mapping[str, ControlConfig],
    before: Evaluation | None,
    after: Evaluation,
    metrics_rows: Sequence[Mapping[str, Any]],
    images_per_class: int,
    numbers: Mapping[str, Any],
) -> list[ReportFigure]:
    """Every picture of the report that the data allows, written to `folder`; `numbers` are those of the summary's `after`."""
    path = plot_distance(picture_file(folder, "distance"), distance_rows(numbers))
    drawn = [described(path, "distance")]
    for column, (name, control) in enumerate(controls.items()):
        drawn += _control_figures(folder, column, name, control, before, after, images_per_class)
    drawn += draw_curves(folder, metrics_rows)
    if after.samples.kl_per_step is not None and len(after.samples):
        path = figures.plot_kl_per_step(picture_file(folder, "kl_per_step"), after.samples.kl_per_step)
        drawn.append(described(path, "kl_per_step"))
    return [figure for figure in drawn if figure is not None]


def draw_curves(folder: Path, metrics_rows: Sequence[Mapping[str, Any]]) -> list[ReportFigure | None]:
    """What the rows of metrics.jsonl show by themselves."""
    return [
        described(curves.plot_curves(picture_file(folder, "curves"), metrics_rows), "curves"),
        described(
            curves.plot_kl_against_accuracy(picture_file(folder, "kl_against_accuracy"), metrics_rows),
            "kl_against_accuracy",
        ),
    ]


def _control_figures(
    folder: Path,
    column: int,
    name: str,
    control: ControlConfig,
    before: Evaluation | None,
    after: Evaluation,
    images_per_class: int,
) -> list[ReportFigure | None]:
    pairs = {"after": after} if before is None else {"before": before, "after": after}
    judged = {title: evaluation.judged["controls"][name] for title, evaluation in pairs.items()}
    rows = grid_rows(column, name, control, before, after, images_per_class)
    drawn = [described(plot_sample_grid(picture_file(folder, "samples", name), rows), "samples", name)]
    if judged["after"]["confusion"] is not None:
        confusions = {title: table["confusion"] for title, table in judged.items() if table["confusion"] is not None}
        file = picture_file(folder, "confusion", name)
        path = figures.plot_confusion(file, control.class_names, control.unit, **confusions)
        drawn.append(described(path, "confusion", name, judged["after"]["judged_by"]))
    values = after.judged["per_sample"]["values"].get(name)
    asked = after.samples.labels[:, column]
    if values is not None and (asked < control.num_classes).any():
        quantity = f"{name}{f' / {control.unit}' if control.unit else ''}"
        earlier = None if before is None else before.judged["per_sample"]["values"].get(name)
        file = picture_file(folder, "values", name)
        path = figures.plot_values(file, control.class_names, control.thresholds, quantity, asked, values, earlier)
        drawn.append(described(path, "values", name))
    file = picture_file(folder, "calibration", name)
    return [*drawn, described(figures.plot_calibration(file, judged), "calibration", name)]


def grid_rows(
    column: int,
    name: str,
    control: ControlConfig,
    before: Evaluation | None,
    after: Evaluation,
    images_per_class: int,
) -> list[tuple[str, list[GridLine]]]:
    """Lines for `plot_sample_grid`: for each class its first samples, above them the same noise before training."""
    rows = []
    row_before = {} if before is None else {int(key): row for row, key in enumerate(before.samples.sample_ids)}
    for index, class_name in enumerate(control.class_names):
        mine = np.flatnonzero(after.samples.labels[:, column] == index)[:images_per_class]
        header = f"{name}, class {index}: {class_name}{f' {control.unit}' if control.unit else ''}"
        lines = []
        for start in range(0, len(mine), _COLUMNS):
            part = mine[start : start + _COLUMNS]
            earlier = [row_before.get(int(after.samples.sample_ids[row])) for row in part]
            if before is not None and None not in earlier:
                lines.append(grid_line("before", before, np.array(earlier, dtype=np.int64), name, index))
            lines.append(grid_line("after", after, part, name, index))
        if lines:
            rows.append((header, lines))
    return rows


def grid_line(title: str, evaluation: Evaluation, rows: np.ndarray, name: str, asked: int) -> GridLine:
    """The samples at `rows`, captioned with what was measured and whether it is the class `asked` of control `name`."""
    per_sample = evaluation.judged["per_sample"]
    values, classes = per_sample["values"].get(name), per_sample["classes"].get(name)
    captions = [""] * len(rows)
    if values is not None:
        captions = [measured_text(value) for value in values[rows]]
    return GridLine(
        title=title,
        images=[evaluation.samples.images[row] for row in rows],
        captions=captions,
        prompts=[evaluation.samples.prompts[row] for row in rows],
        right=[None] * len(rows) if classes is None else [bool(value == asked) for value in classes[rows]],
    )


def run_facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How many updates, and their times."""
    updates = [row for row in rows if row.get("kind") == "update"]
    facts = {"updates": str(len(updates))} if updates else {}
    for name, text in (("update_s", "median time of an update"), ("samples_per_s", "median samples/s in training")):
        known = [row[name] for row in updates if row.get(name) is not None]
        if known:
            facts[text] = f"{np.median(known):.2f}{' s' if name.endswith('_s') and name != 'samples_per_s' else ''}"
    return facts
