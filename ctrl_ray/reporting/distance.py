"""How far the policy is from its target: the report's picture, its table, and what of the distance no training removes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ctrl_ray.canvas import AFTER, BEFORE, INK, new_figure
from ctrl_ray.config import SamplerConfig
from ctrl_ray.reporting.markup import plus_minus, table, text

_BOUND = "#b5402a"
_OF_CLASSES = "certificate/"
_BOUND_BELOW = 0.3


class DistanceRow(NamedTuple):
    """The certificate of one target."""

    control: str | None
    """None: of all samples."""
    label: str
    numbers: Mapping[str, Any]
    """Of `certify_evaluation`."""


def distance_rows(after: Mapping[str, Any]) -> list[DistanceRow]:
    """What is certified in a summary's `after`: all samples, then every class of every control; empty where nothing is."""
    rows = [DistanceRow(None, "all", after)] if after.get("gap") is not None else []
    for name, numbers in after.items():
        if name.startswith(_OF_CLASSES):
            control, _, class_name = name.removeprefix(_OF_CLASSES).partition("/")
            rows.append(DistanceRow(control, class_name, numbers))
    return rows


def distance_section(after: Mapping[str, Any], sampler: SamplerConfig | None) -> str:
    """HTML: the distance class by class, and its structural part in words where the sampler is known; '' without a
    certificate."""
    rows = distance_rows(after)
    if not rows:
        return ""
    head = ["", "objective / nats", "log Z / nats", "gap / nats", "effective sample size", "Pareto k"]
    cells = [
        (
            text(row.label if row.control is None else f"{row.control}, class {row.label}"),
            *(f"{row.numbers[key]:.2f}" for key in ("objective", "log_z")),
            f"{row.numbers['gap']:.2f}{plus_minus(row.numbers['gap_standard_error'])}",
            f"{row.numbers['ess']:.1%}",
            "not known" if row.numbers["pareto_k"] is None else f"{row.numbers['pareto_k']:.2f}",
        )
        for row in rows
    ]
    note = (
        "The gap is log Z minus the objective: the KL divergence of the sampler's paths from those of the target, which no "
        "training makes negative. log Z comes from samples of the pre-trained model, pooled over prompts."
    )
    losses = _structural(sampler, after.get("structural") or {}, after["gap"])
    return f"<h2>Distance to the target</h2>{table(cells, head)}<p class='note'>{note}</p>{losses}"


def _structural(sampler: SamplerConfig | None, parts: Mapping[str, Any], gap: float) -> str:
    if sampler is None:
        return ""
    losses = "".join(f"<li>{text(loss)}</li>" for loss in structural_losses(sampler, parts))
    return (
        "<p class='note'>The gap is the sum of a structural part, which the best policy of this sampler has too, and of what "
        f"more training, or a larger policy, can remove. The structural part comes from:</p><ul class='note'>{losses}</ul>"
        f"{_shares(parts, gap)}"
    )


def _shares(parts: Mapping[str, Any], gap: float) -> str:
    """HTML: how the gap is split, where all parts of this sampler were measured."""
    if "fixed_variances" not in parts:
        return ""
    value = sum(part["value"] for part in parts.values())
    error = math.hypot(*(part["standard_error"] for part in parts.values()))
    return (
        f"<p class='note'>Together {value:.2f} ± {error:.2f} of the {gap:.2f} nats, to second order in most of them; the other "
        f"{max(gap - value, 0.0):.2f} nats are a matter of training.</p>"
    )


def structural_losses(sampler: SamplerConfig, parts: Mapping[str, Any]) -> list[str]:
    """What keeps even the best policy of this sampler from its target, in sentences, with the numbers of `parts`
    (`driver.structural`) where they were measured."""
    memory = "hardly at all at eta 1" if sampler.eta == 1 else f"more than at eta 1, since eta is {sampler.eta:g}"
    judged = ". It is judged by the policy's own pushes, and too high while they are too strong"
    losses = [
        f"fixed step variances{_measured(parts, 'fixed_variances')}: a policy moves the mean of a denoising step, but the "
        "target's steps also have less noise than the pre-trained model's; more steps than "
        f"{sampler.num_steps} make this smaller (sampler.num_steps)"
        f"{judged if 'fixed_variances' in parts else '; not measured'}",
        f"the initial noise{_measured(parts, 'initial_noise')}: the policy starts from the same noise as the pre-trained "
        f"model, but the target prefers some of it, as far as a sample depends on its start ({memory}; sampler.eta)",
    ]
    if count := sampler.reference_steps:
        last = "the last denoising step" if count == 1 else f"the last {count} denoising steps"
        losses.append(
            f"{last}{_measured(parts, 'reference_steps')}: the pre-trained model takes {'it' if count == 1 else 'them'} "
            "(sampler.reference_steps)"
        )
    return losses


def _measured(parts: Mapping[str, Any], name: str) -> str:
    if name not in parts:
        return ""
    value, error = parts[name]["value"], parts[name]["standard_error"]
    if value < 2 * error:
        return f", less than {max(value, 0.0) + 2 * error:.2f} nats (two standard errors)"
    digits = 2 if value >= 0.1 else 4
    return f", {value:.{digits}f} ± {error:.{digits}f} nats"


def plot_distance(path: Path, rows: Sequence[DistanceRow]) -> Path | None:
    """Left: from the objective to log Z, with the bounds on log Z beneath. Right: the gap between them, with two standard
    errors; hollow where bounds and weights say too little. None without rows."""
    if not rows:
        return None
    places, labels, bold = _places(rows)
    with new_figure(path, 7.8, 1.25 + 0.3 * (max(places) + 1)) as figure:
        left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": (3, 2)})
        _draw_levels(left, rows, places)
        _draw_gaps(right, rows, places)
        left.set_yticks([place for place, _ in labels], [label for _, label in labels])
        for tick, (place, _) in zip(left.get_yticklabels(), labels, strict=True):
            tick.set_fontweight("bold" if place in bold else "normal")
        left.set_ylim(max(places) + 0.7, -0.7)
        for axis in (left, right):
            axis.grid(visible=False, axis="y")
            axis.tick_params(axis="y", length=0)
            axis.spines["left"].set_visible(False)
        left.set_title("objective and log Z")
        left.set_xlabel("nats")
        right.set_title("gap (bars: 2 standard errors)")
        right.set_xlabel("nats from the target")
        figure.legend(loc="outside lower left", ncols=3, handles=left.get_legend_handles_labels()[0])
    return path


def _places(rows: Sequence[DistanceRow]) -> tuple[list[int], list[tuple[int, str]], set[int]]:
    """Height of every row, from the top; the names at the heights; those of them that name a control and have no row."""
    places: list[int] = []
    labels: list[tuple[int, str]] = []
    controls: set[int] = set()
    height, before = 0, None
    for row in rows:
        if row.control != before:
            labels.append((height, row.control or ""))
            controls.add(height)
            height, before = height + 1, row.control
        places.append(height)
        labels.append((height, row.label))
        height += 1
    return places, labels, controls


def _draw_levels(axis: Any, rows: Sequence[DistanceRow], places: Sequence[int]) -> None:
    objective, log_z = (np.array([row.numbers[key] for row in rows]) for key in ("objective", "log_z"))
    axis.hlines(places, objective, log_z, color=AFTER, linewidth=2.2, alpha=0.35)
    axis.scatter(objective, places, color=AFTER, s=26, zorder=3, label="the policy's objective")
    axis.scatter(log_z, places, color=INK, marker="|", s=110, zorder=3, label="log Z: no sampler is above it")
    bounds = [row.numbers["bounds"] for row in rows]
    beneath = np.array(places) + _BOUND_BELOW
    for height, (low, high) in zip(beneath, bounds, strict=True):
        if high is not None:
            axis.plot([low, high], [height, height], color=_BOUND, linewidth=0.8)
    known = [(low, height, ">") for (low, _), height in zip(bounds, beneath, strict=True)]
    known += [(high, height, "<") for (_, high), height in zip(bounds, beneath, strict=True) if high is not None]
    for marker, label in ((">", "log Z is at least"), ("<", "log Z is at most")):
        points = [(value, height) for value, height, kind in known if kind == marker]
        if points:
            axis.scatter(*zip(*points, strict=True), color=_BOUND, marker=marker, s=12, zorder=3, label=label)


def _draw_gaps(axis: Any, rows: Sequence[DistanceRow], places: Sequence[int]) -> None:
    gaps, errors = (np.array([row.numbers[key] for row in rows]) for key in ("gap", "gap_standard_error"))
    hollow = [bool(row.numbers["too_wide"]) for row in rows]
    axis.barh(places, gaps, height=0.55, color=["white" if each else AFTER for each in hollow], edgecolor=AFTER)
    axis.errorbar(gaps, places, xerr=2 * errors, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
    for place, gap, error in zip(places, gaps, errors, strict=True):
        axis.annotate(
            f"{gap:.2f} ± {error:.2f}",
            (max(gap + 2 * error, 0.0), place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    low, high = min(0.0, float((gaps - 2 * errors).min())), max(0.0, float((gaps + 2 * errors).max()))
    axis.set_xlim(low, high + 0.45 * (high - low) + 1e-3)
    axis.axvline(0, color=BEFORE, linewidth=0.8)
