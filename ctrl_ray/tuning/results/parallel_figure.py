"""The picture of all trials at once: parallel coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ctrl_ray.canvas import INK, new_figure
from ctrl_ray.tuning.results.trials import SweepTrial, finished_trials, short_names


def plot_parallel(path: Path, trials: Sequence[SweepTrial], knobs: Sequence[str]) -> Path | None:
    """Parallel coordinates: one line for each finished trial through its settings and results, coloured by accuracy;
    None for fewer than two trials."""
    done = finished_trials(trials)
    if len(done) < 2:
        return None
    names = short_names(knobs)
    columns: list[tuple[str, list[Any]]] = [
        (names[path_], [trial.knobs.get(path_) for trial in done]) for path_ in knobs
    ]
    columns += [
        ("exponent", [trial.exponent for trial in done]),
        ("KL / nats", [trial.metrics["kl"] for trial in done]),
    ]
    if all(trial.metric("prompt_fidelity") is not None for trial in done):
        columns.append(("fidelity", [trial.metrics["prompt_fidelity"] for trial in done]))
    accuracy = np.array([trial.metrics["accuracy"] for trial in done])
    columns.append(("accuracy", list(accuracy)))
    norm = Normalize(accuracy.min(), max(accuracy.max(), accuracy.min() + 1e-6))
    with new_figure(path, 1.6 + 1.25 * len(columns), 4.2) as figure:
        axis = figure.subplots()
        heights = np.stack([_draw_coordinate(axis, place, *column) for place, column in enumerate(columns)], axis=1)
        colours = colormaps["viridis"](norm(accuracy))
        for row in np.argsort(accuracy):
            axis.plot(range(len(columns)), heights[row], color=colours[row], linewidth=1.6, alpha=0.9, zorder=3)
        axis.set_xlim(-0.25, len(columns) - 0.45)
        axis.set_ylim(-0.06, 1.06)
        axis.set_xticks(
            range(len(columns)), [name if len(name) <= 12 else name.replace("_", "_\n", 1) for name, _ in columns]
        )
        axis.xaxis.tick_top()
        axis.yaxis.set_major_locator(NullLocator())
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    return path


def _draw_coordinate(axis: Any, place: int, name: str, values: list[Any]) -> np.ndarray:
    """One vertical axis with its ticks; returns the heights of the values in [0, 1]."""
    axis.axvline(place, color=INK, linewidth=0.8, zorder=1)
    numbers = all(isinstance(value, int | float | np.number) for value in values)
    if not numbers:
        kinds = sorted({str(value) for value in values})
        heights = np.array([kinds.index(str(value)) for value in values]) / max(1, len(kinds) - 1)
        ticks = [(index / max(1, len(kinds) - 1), kind) for index, kind in enumerate(kinds)]
    else:
        data = np.array(values, dtype=np.float64)
        finite = data[np.isfinite(data)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
        logarithmic = low > 0 and high / low > 3 and name not in ("accuracy", "fidelity", "KL / nats")
        scale = np.log if logarithmic else (lambda x: x)
        span = float(scale(high) - scale(low)) or 1.0
        heights = np.clip((scale(np.clip(data, low, high)) - scale(low)) / span, 0, 1)
        if high == low:
            heights, ticks = np.full(len(data), 0.5), [(0.5, f"{low:.4g}")]
        else:
            marks = LogLocator(subs=(1.0, 2.0, 5.0)) if logarithmic else MaxNLocator(5, steps=[1, 2, 5, 10])
            round_values = [float(mark) for mark in marks.tick_values(low, high)]
            inside = [mark for mark in round_values if low - 1e-9 * span <= mark <= high + 1e-9 * span]
            ticks = [(float((scale(mark) - scale(low)) / span), f"{mark:.4g}") for mark in inside]
    for height, label in ticks:
        axis.plot([place - 0.03, place + 0.03], [height, height], color=INK, linewidth=0.8, zorder=1)
        box = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6}
        axis.text(place + 0.06, height, label, fontsize=7.5, va="center", zorder=4, bbox=box)
    return heights
