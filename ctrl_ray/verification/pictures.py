"""Pictures of a comparison with exact samples: all classes and statistics at a glance, and the laws of one statistic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ctrl_ray.canvas import AFTER, BEFORE, INK, new_figure
from ctrl_ray.verification.distances import PromptRows, match, statistics_of
from ctrl_ray.verification.measured import Measured
from ctrl_ray.verification.rejection import Pool
from ctrl_ray.verification.target import JointClass

EXACT = "#c7791a"
MAX_PANELS = 24
"""Joint classes in one picture; beyond it the farthest ones are shown."""


def shown_classes(results: Mapping[str, Any]) -> list[int]:
    """Indices of the classes to draw, in their own order: all, or the MAX_PANELS that are farthest from exact."""
    ratios = [math.inf if row["bar_ratio"] is None else row["bar_ratio"] for row in results["classes"]]
    return sorted(sorted(range(len(ratios)), key=lambda index: -ratios[index])[:MAX_PANELS])


def plot_overview(path: Path, results: Mapping[str, Any]) -> Path:
    """Left: reached / noise floor of every class (rows) and distance (columns). Right: each class's gap with its error."""
    shown = shown_classes(results)
    rows = [results["classes"][index] for index in shown]
    titles = list(dict.fromkeys(_title(d) for row in rows for d in row["distances"]))
    ratios = np.full((len(rows), len(titles)), np.nan)
    for line, row in enumerate(rows):
        for d in row["distances"]:
            ratios[line, titles.index(_title(d))] = np.nan if d["ratio"] is None else d["ratio"]
    with new_figure(path, 3.4 + 0.62 * len(titles) + 2.4, 1.9 + 0.3 * len(rows)) as figure:
        table, gaps = figure.subplots(1, 2, sharey=True, width_ratios=[max(len(titles), 1), 4])
        _draw_ratios(table, ratios, titles, results["bar"]["max_ratio"])
        table.set_yticks(range(len(rows)), [row["name"] for row in rows])
        table.set_title("distance to exact samples / noise floor" + _omitted(results, shown))
        certificates = [row["certificate"] for row in rows]
        gaps.barh(
            range(len(rows)),
            [certificate["gap"] for certificate in certificates],
            xerr=[certificate["gap_standard_error"] for certificate in certificates],
            color=AFTER,
            ecolor=INK,
            height=0.6,
        )
        gaps.axvline(0, color=INK, linewidth=0.7)
        gaps.set_title("gap to the target / nats")
        gaps.tick_params(axis="y", length=0)
    return path


def _title(distance: Mapping[str, Any]) -> str:
    return f"{distance['statistic']}\n{distance['distance']}"


def _omitted(results: Mapping[str, Any], shown: Sequence[int]) -> str:
    total = len(results["classes"])
    return f" ({len(shown)} of {total} classes: the farthest)" if len(shown) < total else ""


def _draw_ratios(axis: Any, ratios: np.ndarray, titles: Sequence[str], bar: float) -> None:
    if ratios.size:
        axis.imshow(np.log(np.maximum(ratios, 1)), cmap="Oranges", vmin=0, vmax=math.log(4 * bar), aspect="auto")
    for row, column in np.argwhere(np.isfinite(ratios)):
        value = ratios[row, column]
        style = {"fontweight": "bold"} if value > bar else {}
        colour = "white" if value > 2 * bar else INK
        axis.text(column, row, _short(value), ha="center", va="center", fontsize=7.5, color=colour, **style)
    axis.set_xticks(range(len(titles)), titles, rotation=40, ha="right", fontsize=7.5)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def _short(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def plot_statistic(
    path: Path,
    pool: Pool,
    tuned: Measured,
    controls: Sequence[str],
    classes: Sequence[JointClass],
    bar: tuple[str, str],
    label: str,
    results: Mapping[str, Any],
) -> Path:
    """A panel for each joint class: the densities of one statistic of pre-trained, exact and fine-tuned samples, with the
    prompts that are compared, as often in all three.

    bar: The statistic, and the distance whose ratio is told. label: The x axis's, with its unit.
    """
    shown = shown_classes(results)
    columns = 1 if len(shown) <= 4 else 2 if len(shown) <= 12 else 3
    lines = -(-len(shown) // columns)
    everything = np.concatenate([statistics_of(pool.samples, classes[index], controls)[bar[0]] for index in shown])
    low, high = np.percentile(everything, (0.2, 99.8))
    bins = np.linspace(low, high if high > low else low + 1, 60)
    with new_figure(path, (7.2, 10.0, 12.0)[columns - 1], 1.3 * lines + 1) as figure:
        axes = np.atleast_1d(figure.subplots(lines, columns, sharex=True, squeeze=False)).ravel()
        for axis, index in zip(axes, shown, strict=False):
            groups = match(pool.samples, pool.accepted[index], tuned, classes[index])
            of_pool, of_tuned = (statistics_of(s, classes[index], controls)[bar[0]] for s in (pool.samples, tuned))
            _draw_densities(axis, bins, of_pool, of_tuned, groups)
            axis.set_title(classes[index].name + _noise_floors(results["classes"][index], bar), fontsize=8.5)
        for axis in axes[len(shown) :]:
            axis.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
        figure.supxlabel(label, fontsize=9)
        figure.supylabel("density", fontsize=9)
    return path


def _noise_floors(row: Mapping[str, Any], bar: tuple[str, str]) -> str:
    ratios = [d["ratio"] for d in row["distances"] if (d["statistic"], d["distance"]) == bar]
    return f": {ratios[0]:.1f} noise floors" if ratios and ratios[0] is not None else ": not compared"


def _draw_densities(
    axis: Any, bins: np.ndarray, of_pool: np.ndarray, of_tuned: np.ndarray, groups: Sequence[PromptRows]
) -> None:
    step: Any = {"histtype": "step"}
    kinds: list[tuple[str, np.ndarray, list[np.ndarray], dict[str, Any]]] = [
        ("pre-trained", of_pool, [group.pool for group in groups], {**step, "color": BEFORE, "linewidth": 0.8}),
        ("exact (rejection)", of_pool, [group.exact for group in groups], {"color": EXACT, "alpha": 0.45}),
        ("fine-tuned", of_tuned, [group.reached for group in groups], {**step, "color": AFTER, "linewidth": 1.4}),
    ]
    compared = any(group.size for group in groups)
    for name, values, rows, style in kinds:
        # a prompt counts as often as in the distances; without any, all samples count
        counts = [group.size / max(len(each), 1) if compared else 1.0 for group, each in zip(groups, rows, strict=True)]
        weights = np.repeat(counts, [len(each) for each in rows])
        if weights.sum() > 0:
            axis.hist(values[np.concatenate(rows)], bins, weights=weights, density=True, label=name, **style)
    axis.set_yticks([])
