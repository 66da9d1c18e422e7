"""The pictures of a comparison: accuracy and distance against what an image costs, and the same noise drawn by every method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.text import Annotation, Text
from matplotlib.ticker import NullLocator
from matplotlib.transforms import Bbox

from ctrl_ray.canvas import AFTER, BEFORE, INK, new_figure, shortened
from ctrl_ray.comparison.results import interval
from ctrl_ray.config import ControlConfig
from ctrl_ray.evaluation.judging import oracle_labels
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.reporting.sample_grid import GridLine, plot_sample_grid

_STEPS = (6, 12, 20, 30, 42, 56, 72, 90, 110, 135)
"""Distances of a label from its point, in points; the nearest free place is taken."""
_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_DOT = 7.0
"""Side in points of the square around a point that no label covers."""
_GRID_COLUMNS = 8
UNTRAINED = "#c7791a"
"""Colour of what trains no policy."""
_TITLE_LENGTH = 24


def plot_accuracy(path: Path, methods: Sequence[Mapping[str, Any]]) -> Path | None:
    """Accuracy with its 95 % interval against the cost of an image; None where nothing measures the accuracy."""
    known = [row for row in methods if row["test"]["accuracy"] is not None]
    if not known:
        return None
    values = [row["test"]["accuracy"] for row in known]
    bounds = [interval(row["test"]["accuracy"], row["test"]["errors"]["accuracy"] or 0.0) for row in known]
    low, high = np.array(bounds, dtype=np.float64).T
    bars = [(values - low).tolist(), (high - values).tolist()]
    return _scatter(path, known, values, bars, "accuracy (true class)", log=False)


def plot_distance_to_target(path: Path, methods: Sequence[Mapping[str, Any]]) -> Path | None:
    """Distance of the worst class over the noise floor against the cost of an image, with the range over seeds; None where no
    distance is known."""
    known = [row for row in methods if row["test"]["common_distance"]["worst"] is not None]
    if not known:
        return None
    values = [row["test"]["common_distance"]["worst"] for row in known]
    ranges = [row["test"]["common_distance"]["range"] for row in known]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ranges, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ranges, strict=True)]
    return _scatter(path, known, values, [below, above], "distance to the target, worst class / noise floor", log=True)


def _scatter(
    path: Path,
    methods: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    bars: Sequence[Sequence[float]],
    label: str,
    *,
    log: bool,
) -> Path:
    costs = [row["cost"]["ratio"] for row in methods]
    colours = [AFTER if row["trained"] else BEFORE if row["name"] == "plain" else UNTRAINED for row in methods]
    with new_figure(path, 7.2, 4.4, layout=None) as figure:
        axis = figure.add_axes((0.1, 0.13, 0.87, 0.8))
        axis.set_xscale("log")
        if log:
            axis.set_yscale("log")
        for x, y, below, above, colour in zip(costs, values, *bars, colours, strict=True):
            axis.errorbar(x, y, yerr=[[below], [above]], fmt="none", ecolor=colour, elinewidth=0.9, capsize=2)
        axis.scatter(costs, values, c=colours, s=26, zorder=3)
        axis.set_xlim(min(costs) / 1.4, max(costs) * 2.2)
        low, high = min(values), max(values)
        if log:
            axis.set_ylim(low / 1.35, high * 1.35)
            axis.axhline(1.0, color=INK, linestyle="--", linewidth=0.8)
            plain_ticks(axis.yaxis, low / 1.35, high * 1.35)
        else:
            axis.set_ylim(max(0.0, low - 0.12), min(1.05, high + 0.12))
        plain_ticks(axis.xaxis, min(costs) / 1.4, max(costs) * 2.2)
        axis.set_xlabel("cost of an image / plain samples (seconds, measured side by side)")
        axis.set_ylabel(label)
        ends = [(x, y - below, y + above) for x, y, below, above in zip(costs, values, *bars, strict=True)]
        place_labels(axis, costs, values, [row["title"] for row in methods], colours, _obstacles(axis, ends, line=log))
    return path


def plain_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks at 1, 2, 5, 10 … as plain numbers, of a logarithmic axis."""
    every = [digit * 10.0**power for power in range(-3, 6) for digit in (1, 2, 5)]
    ticks = [tick for tick in every if low <= tick <= high]
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_minor_locator(NullLocator())


def _obstacles(axis: Any, bars: Sequence[tuple[float, float, float]], *, line: bool) -> list[Bbox]:
    """What labels leave free: bars (x, low, high), and a line at 1 across the axis."""
    boxes = []
    for x, low, high in bars:
        (left, bottom), (_, top) = axis.transData.transform([(x, low), (x, high)])
        boxes.append(Bbox.from_extents(left - 2, bottom, left + 2, top + 1))
    if line:
        frame = axis.get_window_extent()
        _, height = axis.transData.transform((axis.get_xlim()[0], 1.0))
        boxes.append(Bbox.from_extents(frame.x0, height - 1, frame.x1, height + 1))
    return boxes


def place_labels(
    axis: Any,
    xs: Sequence[float],
    ys: Sequence[float],
    labels: Sequence[str],
    colours: Sequence[str],
    obstacles: Sequence[Bbox] = (),
) -> list[Annotation]:
    """A label beside each point, at the nearest free place: it covers no other label, no point and no obstacle. A thin line
    leads to one that is far away. The axis has its limits and scales already."""
    figure = axis.figure
    scale = figure.dpi / 72
    dots = [
        Bbox.from_bounds(x - _DOT * scale / 2, y - _DOT * scale / 2, _DOT * scale, _DOT * scale)
        for x, y in axis.transData.transform(np.column_stack([xs, ys]))
    ]
    taken, placed = [*dots, *obstacles], []
    inside = axis.get_window_extent()
    for x, y, label, colour in zip(xs, ys, labels, colours, strict=True):
        for step, (right, up) in ((step, direction) for step in _STEPS for direction in _DIRECTIONS):
            note = axis.annotate(
                label,
                (x, y),
                xytext=(right * step, up * step),
                textcoords="offset points",
                ha=("right", "center", "left")[right + 1],
                va=("top", "center", "bottom")[up + 1],
                fontsize=8.5,
                color=colour if colour != BEFORE else INK,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6} if step > _STEPS[1] else None,
            )
            box = _text_box(note)
            free = inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1
            if free and not any(box.overlaps(other) for other in taken):
                break
            if (step, (right, up)) != (_STEPS[-1], _DIRECTIONS[-1]):
                note.remove()
        taken.append(box)
        placed.append(note)
    return placed


def _text_box(note: Annotation) -> Bbox:
    """Of the words alone, without the line."""
    figure = note.get_figure(root=True)
    assert figure is not None
    note.update_positions(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    return Text.get_window_extent(note)


def plot_grid(
    path: Path, samples: Mapping[str, EvaluationSamples], name: str, control: ControlConfig, column: int
) -> Path | None:
    """A line for each method, by its title, and the same noise in each column; the first images of every class in turn.

    Captions are the measured number and whether it is of the class asked for.
    """
    first = next(iter(samples.values()))
    asked = first.labels[:, column]
    a_class = max(1, _GRID_COLUMNS // control.num_classes)
    rows = np.concatenate([np.flatnonzero(asked == label)[:a_class] for label in range(control.num_classes)])
    rows = rows[:_GRID_COLUMNS]
    lines = [_grid_line(title, part, rows, name, control, column) for title, part in samples.items()]
    unit = f" / {control.unit}" if control.unit else ""
    return plot_sample_grid(path, [(f"{name}{unit}: the same prompt, class and noise in each column", lines)])


def _grid_line(
    title: str, samples: EvaluationSamples, rows: np.ndarray, name: str, control: ControlConfig, column: int
) -> GridLine:
    part = samples.select(rows)
    judged = oracle_labels(name, control, part.images, part.prompts) if control.oracle else None
    asked = part.labels[:, column]
    values = None if judged is None else judged.values
    return GridLine(
        title=shortened(title, _TITLE_LENGTH),
        images=list(part.images),
        captions=[""] * len(part) if values is None else [f"{value:.0f}" for value in values],
        prompts=[
            f"{prompt.removeprefix('a ')} {control.class_names[label]}"
            for prompt, label in zip(part.prompts, asked, strict=True)
        ],
        right=[None] * len(part) if judged is None else (judged.classes == asked).tolist(),
    )
