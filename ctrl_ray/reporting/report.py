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
from ctrl_ray.reporting.sample_grid import GridLine, plot_sample_grid
from ctrl_ray.reporting.summary import Evaluation, make_summary

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
    pictures += [
        ReportFigure(title, "Stage 1, on held-out data.", Path(path))
        for title, path in (classifier_figures or {}).items()
    ]
    page = render_page(
        summary,
        pictures,
        controls=controls,
        prompt=after.samples.prompts[0] if len(after.samples) else "PROMPT",
        source=source,
        facts={**_run_facts(metrics_rows), **(facts or {}), **environment_facts()},
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
    drawn = [
        _figure(
            plot_distance(folder / "distance.png", distance_rows(numbers)),
            "Distance to the target",
            "The line from the objective to log Z is the gap; no training makes it negative. The red marks bound log Z. A "
            "hollow bar: bounds and weights say too little about it.",
            wide=True,
        )
    ]
    for column, (name, control) in enumerate(controls.items()):
        drawn += _control_figures(folder, column, name, control, before, after, images_per_class)
    drawn.append(
        _figure(
            curves.plot_curves(folder / "curves.png", metrics_rows),
            "Curves",
            "Over the run's updates. Accuracy is by the true measure, never by the reward classifier.",
        )
    )
    drawn.append(
        _figure(
            curves.plot_kl_against_accuracy(folder / "kl_against_accuracy.png", metrics_rows),
            "KL against accuracy",
            "One point for each evaluation of the run: what accuracy has cost in distance from the pre-trained model.",
        )
    )
    if after.samples.kl_per_step is not None and len(after.samples):
        path = figures.plot_kl_per_step(folder / "kl_per_step.png", after.samples.kl_per_step)
        drawn.append(_figure(path, "KL along the trajectory", "Where the policy departs from the pre-trained model."))
    return [figure for figure in drawn if figure is not None]


def _control_figures(
    folder: Path,
    column: int,
    name: str,
    control: ControlConfig,
    before: Evaluation | None,
    after: Evaluation,
    images_per_class: int,
) -> list[ReportFigure | None]:
    file = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
    pairs = {"after": after} if before is None else {"before": before, "after": after}
    judged = {title: evaluation.judged["controls"][name] for title, evaluation in pairs.items()}
    rows = grid_rows(column, name, control, before, after, images_per_class)
    drawn = [
        _figure(
            plot_sample_grid(folder / f"samples_{file}.png", rows),
            f"Samples by {name}",
            "Each column is one prompt and one noise. The number is the measured one; ✓ or ✗ says whether it is in the "
            "class asked for. The pre-trained model is not told the class.",
            wide=True,
        )
    ]
    if judged["after"]["confusion"] is not None:
        confusions = {title: table["confusion"] for title, table in judged.items() if table["confusion"] is not None}
        path = figures.plot_confusion(folder / f"confusion_{file}.png", control.class_names, control.unit, **confusions)
        text = f"Rows: class asked for. Columns: class measured by {judged['after']['judged_by']}. Share of the row."
        drawn.append(_figure(path, f"Confusion matrix of {name}", text))
    values = after.judged["per_sample"]["values"].get(name)
    asked = after.samples.labels[:, column]
    if values is not None and (asked < control.num_classes).any():
        quantity = f"{name}{f' / {control.unit}' if control.unit else ''}"
        earlier = None if before is None else before.judged["per_sample"]["values"].get(name)
        path = figures.plot_values(
            folder / f"values_{file}.png", control.class_names, control.thresholds, quantity, asked, values, earlier
        )
        drawn.append(_figure(path, f"Measured {name}", "Dashed: the thresholds. Shaded: the range asked for."))
    drawn.append(
        _figure(
            figures.plot_calibration(folder / f"calibration_{file}.png", judged),
            f"Belief and truth, {name}",
            "Samples in bins of what the reward classifier believes, against the share truly of the class asked for. "
            "Below the dashed line it believes too much. A dot's area grows with its count; bars are 95 % intervals.",
        )
    )
    return drawn


def _figure(path: Path | None, title: str, caption: str, *, wide: bool = False) -> ReportFigure | None:
    return None if path is None else ReportFigure(title, caption, path, wide)


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
        captions = [f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" for value in values[rows]]
    return GridLine(
        title=title,
        images=[evaluation.samples.images[row] for row in rows],
        captions=captions,
        prompts=[evaluation.samples.prompts[row] for row in rows],
        right=[None] * len(rows) if classes is None else [bool(value == asked) for value in classes[rows]],
    )


def _run_facts(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    updates = [row for row in rows if row.get("kind") == "update"]
    facts = {"updates": str(len(updates))} if updates else {}
    for name, text in (("update_s", "median time of an update"), ("samples_per_s", "median samples/s in training")):
        known = [row[name] for row in updates if row.get(name) is not None]
        if known:
            facts[text] = f"{np.median(known):.2f}{' s' if name.endswith('_s') and name != 'samples_per_s' else ''}"
    return facts
