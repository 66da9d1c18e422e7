"""The pictures of a report, each a PNG with its units written on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BEFORE, AFTER = "#8b929c", "#1d5f9e"
INK, FAINT = "#22272e", "#d9dde3"
_DPI = 130
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@contextmanager
def new_figure(
    path: Path, width: float, height: float, *, layout: Literal["constrained"] | None = "constrained"
) -> Iterator[Figure]:
    """A figure of width × height inches in the report's style, written to `path` on leaving. No global state."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout=layout)
        FigureCanvasAgg(figure)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=_DPI, facecolor="white")


def plot_curves(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """Reward, KL and accuracy over updates, from the rows of `metrics.jsonl`; None when no row holds any of them."""
    panels = {
        "reward": "reward / nats",
        "kl": "KL to the\npre-trained model / nats",
        "accuracy": "accuracy (true class)",
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
                axis.plot(*evaluations.T, color=INK, linestyle="--", label="evaluation", **style)
            for control in _controls(rows, name):
                points = _series(rows, "evaluation", f"{name}/{control}")
                axis.plot(*points.T, linewidth=1, linestyle=":", marker=".", label=control)
            axis.set_ylabel(panels[name])
            axis.legend(loc="best")
        if "accuracy" in present:
            axes[-1].set_ylim(0, 1.02)
        if "kl" in present:
            axes[present.index("kl")].set_ylim(bottom=0)
        axes[-1].set_xlabel("update")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    return path


def _series(rows: Sequence[Mapping[str, Any]], kind: str, name: str) -> np.ndarray:
    """(n, 2) update and value."""
    points = [(row["update"], row[name]) for row in rows if row.get("kind") == kind and row.get(name) is not None]
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def _controls(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """Controls with a curve of their own; with one control it would lie on the curve of the mean."""
    found = sorted({key.partition("/")[2] for row in rows for key in row if key.startswith(f"{name}/")})
    return found if len(found) > 1 else []


def plot_kl_against_accuracy(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path | None:
    """Accuracy over KL, one point for each evaluation of the run, with its update (the report's own, of the same update as the
    one before it: "final"); None with no such evaluation."""
    points = [
        (row["kl"], row["accuracy"], row["update"])
        for row in rows
        if row.get("kind") == "evaluation" and row.get("kl") is not None and row.get("accuracy") is not None
    ]
    if not points:
        return None
    kl, accuracy, updates = (np.array(column, dtype=np.float64) for column in zip(*points, strict=True))
    with new_figure(path, 5.2, 3.9) as figure:
        axis = figure.subplots()
        axis.plot(kl, accuracy, color=AFTER, marker="o", markersize=5, linewidth=1.2)
        for index in np.unique(np.linspace(0, len(kl) - 1, min(len(kl), 10)).round().astype(int)):
            final = index > 0 and updates[index] == updates[index - 1]
            text = "final" if final else f"{'update ' if index == 0 else ''}{updates[index]:.0f}"
            place = (-4, 5) if final else (4, -11)  # they lie close together
            axis.annotate(text, (kl[index], accuracy[index]), xytext=place, textcoords="offset points", fontsize=7.5)
        axis.set_xlabel("KL to the pre-trained model / nats")
        axis.set_ylabel("accuracy (true class)")
        axis.set_ylim(0, 1.02)
        axis.set_xlim(left=min(0.0, float(kl.min())), right=float(kl.max()) * 1.12 + 1e-3)
    return path


def plot_kl_per_step(path: Path, kl_per_step: np.ndarray) -> Path:
    """Where along the trajectory the KL is spent: bars of the mean over samples of (N, T) nats, in sampling order."""
    means = kl_per_step.mean(axis=0)
    with new_figure(path, 5.2, 2.7) as figure:
        axis = figure.subplots()
        axis.bar(np.arange(len(means)), means, color=AFTER, width=0.75)
        axis.set_title(f"KL after training: {means.sum():.2f} nats in all")
        axis.set_xlabel("denoising step (0 = from pure noise)")
        axis.set_ylabel("KL / nats")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axis.grid(visible=False, axis="x")
    return path


def plot_confusion(path: Path, classes: Sequence[str], unit: str, **confusions: Sequence[Sequence[int]]) -> Path:
    """Confusion matrices side by side, titled by keyword: counts and the share of the row; row = asked for."""
    side = max(2.6, 0.62 * len(classes) + 1.0)
    with new_figure(path, side * len(confusions) + 0.6, side + 0.35) as figure:
        axes = np.atleast_1d(figure.subplots(1, len(confusions), sharey=True))
        for axis, (title, counts) in zip(axes, confusions.items(), strict=True):
            _draw_confusion(axis, np.asarray(counts), classes)
            axis.set_title(title)
            axis.set_xlabel(f"measured class{f' / {unit}' if unit else ''}")
        axes[0].set_ylabel(f"class asked for{f' / {unit}' if unit else ''}")
    return path


def _draw_confusion(axis: Any, counts: np.ndarray, classes: Sequence[str]) -> None:
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1.15)
    for row, column in np.ndindex(*counts.shape):
        axis.text(
            column,
            row,
            f"{counts[row, column]}\n{shares[row, column]:.0%}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if shares[row, column] > 0.6 else INK,
        )
    axis.set_xticks(range(len(classes)), classes, rotation=30, ha="right")
    axis.set_yticks(range(len(classes)), classes)
    axis.grid(visible=False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def plot_values(
    path: Path,
    classes: Sequence[str],
    thresholds: Sequence[float],
    quantity: str,
    asked: np.ndarray,
    after: np.ndarray,
    before: np.ndarray | None,
) -> Path:
    """Histograms of the oracle's number: the pre-trained model's above, then one for each class asked for.

    Dashed lines are the thresholds, the shaded band is the class asked for. `asked` and `after` (N,); `before` (M,) or
    None; `quantity` is the x label with its unit.
    """
    panels: list[tuple[str, np.ndarray, int | None]] = [] if before is None else [("before: all samples", before, None)]
    for label, name in enumerate(classes):
        values = after[asked == label]
        inside = np.searchsorted(thresholds, values, side="right") == label if len(thresholds) else values == label
        share = f"{inside.mean():.0%} inside" if len(values) else "no sample"
        panels.append((f"after, asked for {name}: {share}", values, label))
    everything = np.concatenate([values for _, values, _ in panels])
    low, high = float(everything.min()), float(everything.max())
    margin = 0.02 * (high - low) or 0.5
    bins = np.linspace(low - margin, high + margin, 49)
    borders = [min(bins[0], *thresholds), *thresholds, max(bins[-1], *thresholds)] if len(thresholds) else []
    with new_figure(path, 6.4, 0.5 + 1.1 * len(panels)) as figure:
        axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True))
        for axis, (title, values, index) in zip(axes, panels, strict=True):
            if index is not None and borders:
                axis.axvspan(borders[index], borders[index + 1], color=AFTER, alpha=0.10, linewidth=0)
            axis.hist(values, bins=bins, color=BEFORE if index is None else AFTER)
            for threshold in thresholds:
                axis.axvline(threshold, color=INK, linestyle="--", linewidth=0.8)
            axis.set_title(title, fontsize=9)
            axis.set_ylabel("samples")
            axis.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=3))
        axes[-1].set_xlim(bins[0], bins[-1])
        axes[-1].set_xlabel(quantity)
    return path


def plot_calibration(path: Path, judged: Mapping[str, Mapping[str, Any]]) -> Path | None:
    """What the reward classifier believes against the truth: mean p(class asked for) and share truly of it, in bins.

    `judged`: title ("before", "after") to a control's judgement. A dot's area grows with its count; bars are 95 %
    Wilson intervals. None when there is no belief.
    """
    known = {title: control for title, control in judged.items() if control.get("calibration")}
    if not known:
        return None
    with new_figure(path, 4.8, 5.1) as figure:
        axis = figure.subplots()
        axis.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle="--", label="belief = truth")
        for title, control in known.items():
            bins = control["calibration"]
            x, y, low, high, count = (
                np.array([row[key] for row in bins]) for key in ("believed", "measured", "low", "high", "count")
            )
            colour = AFTER if title == "after" else BEFORE
            label = (
                f"{title}: believes {control['believed_accuracy']:.3f}, true {control['accuracy']:.3f} "
                f"(gap {control['belief_gap']:+.3f})"
            )
            axis.errorbar(
                x, y, yerr=np.stack([np.maximum(y - low, 0), np.maximum(high - y, 0)]), fmt="none", ecolor=colour
            )
            axis.scatter(
                x, y, s=15 + 160 * count / count.sum(), color=colour, label=label, zorder=3, edgecolors="white"
            )
        axis.set_xlim(-0.02, 1.02)
        axis.set_ylim(-0.02, 1.02)
        axis.set_aspect("equal")
        axis.set_xlabel("classifier's p(class asked for)")
        axis.set_ylabel("share truly of that class")
        figure.legend(loc="outside lower left")
    return path
