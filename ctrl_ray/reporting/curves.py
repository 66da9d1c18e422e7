"""Curves of a run, from the rows of its `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from ctrl_ray.canvas import AFTER, INK, new_figure


def plot_curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """Reward or denoising loss, KL, accuracy and gap over updates, from the rows of `metrics.jsonl`; None where no row has any.

    Bars on the gap are two standard errors.
    """
    panels = {
        "reward": "reward / nats",
        "denoising_loss": "denoising loss",
        "kl": "KL to the\npre-trained model / nats",
        "accuracy": "accuracy (true class)",
        "gap": "gap to the\ntarget / nats",
    }
    present = [name for name in panels if any(row.get(name) is not None for row in rows)]
    if not present:
        return None
    with new_figure(path, 6.4, 0.6 + 1.75 * len(present)) as figure:
        axes = np.atleast_1d(figure.subplots(len(present), 1, sharex=True))
        for axis, name in zip(axes, present, strict=True):
            updates, evaluations = _series(rows, "update", name), _series(rows, "evaluation", name)
            if len(updates):
                axis.plot(*updates.T, color=AFTER, linewidth=1.4, label="training batch")
            if len(evaluations):
                style = {"marker": "o", "markersize": 4, "linewidth": 1.0}
                label = "mean of the controls" if _controls(rows, name) else "evaluation"
                axis.plot(*evaluations.T, color=INK, linestyle="--", label=label, **style)
            if name == "gap":
                _draw_errors(axis, rows)
            for control in _controls(rows, name):
                points = _series(rows, "evaluation", f"{name}/{control}")
                axis.plot(*points.T, linewidth=1, linestyle=":", marker=".", label=control)
            axis.set_ylabel(panels[name])
            axis.legend(loc="best")
        if "accuracy" in present:
            axes[present.index("accuracy")].set_ylim(0, 1.02)
        if "kl" in present:
            axes[present.index("kl")].set_ylim(bottom=0)
        axes[-1].set_xlabel("update")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return path


def _draw_errors(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    known = [
        (row["update"], row["gap"], 2 * row["gap_standard_error"])
        for row in rows
        if row.get("kind") == "evaluation" and None not in (row.get("gap"), row.get("gap_standard_error"))
    ]
    for update, gap, error in known:
        axis.errorbar(update, gap, yerr=error, fmt="none", ecolor=INK, elinewidth=0.9, capsize=2)
    axis.set_ylim(bottom=min([0.0, *(gap - error for _, gap, error in known)]))


def _series(rows: Sequence[Mapping[str, Any]], kind: str, name: str) -> np.ndarray:
    """(n, 2) update and value."""
    points = [(row["update"], row[name]) for row in rows if row.get("kind") == kind and row.get(name) is not None]
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def _controls(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Controls with a curve of their own, NAME/CONTROL; with one control it would lie on the curve of the mean. What is
    measured of single classes, NAME/CONTROL/CLASS, would be too many curves."""
    found = {key.partition("/")[2] for row in rows for key in row if key.startswith(f"{name}/")}
    controls = sorted(control for control in found if "/" not in control)
    return controls if len(controls) > 1 else []


def plot_kl_against_accuracy(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """Accuracy over KL, one point for each evaluation of the run, with its update (the report's own, of the same update as the
    one before it: "final"), and a line for each of several controls; None with no such evaluation."""
    known = [
        row
        for row in rows
        if row.get("kind") == "evaluation" and row.get("kl") is not None and row.get("accuracy") is not None
    ]
    if not known:
        return None
    kl, accuracy, updates = (
        np.array([row[key] for row in known], dtype=np.float64) for key in ("kl", "accuracy", "update")
    )
    with new_figure(path, 5.2, 3.9) as figure:
        axis = figure.subplots()
        axis.plot(kl, accuracy, color=AFTER, marker="o", markersize=5, linewidth=1.2)
        for index in np.unique(np.linspace(0, len(kl) - 1, min(len(kl), 10)).round().astype(int)):
            final = index > 0 and updates[index] == updates[index - 1]
            text = "final" if final else f"{'update ' if index == 0 else ''}{updates[index]:.0f}"
            place = (-4, 5) if final else (4, -11)  # they lie close together
            axis.annotate(text, (kl[index], accuracy[index]), xytext=place, textcoords="offset points", fontsize=7.5)
        for control in _controls(rows, "accuracy"):
            own = [(row["kl"], row.get(f"accuracy/{control}", np.nan)) for row in known]
            axis.plot(*np.array(own).T, linewidth=1, linestyle=":", marker=".", label=control)
        if _controls(rows, "accuracy"):
            axis.lines[0].set_label("mean of the controls")
            axis.legend(loc="best")
        axis.set_xlabel("KL to the pre-trained model / nats")
        axis.set_ylabel("accuracy (true class)")
        axis.set_ylim(0, 1.02)
        axis.set_xlim(left=min(0.0, float(kl.min())), right=float(kl.max()) * 1.12 + 1e-3)
    return path
