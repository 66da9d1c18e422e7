"""The pictures of a report, each a PNG with its units written on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from ctrl_ray.canvas import AFTER, BEFORE, INK, new_figure, shortened

_LONGEST_NAME = 28
"""Characters of a class name at an axis: the panels keep their room."""


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
    names = [shortened(name, _LONGEST_NAME) for name in classes]
    axis.set_xticks(range(len(classes)), names, rotation=30, ha="right")
    axis.set_yticks(range(len(classes)), names)
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
        panels.append((f"after, asked for {shortened(name, _LONGEST_NAME)}: {share}", values, label))
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
