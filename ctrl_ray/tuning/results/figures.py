"""The pictures of a sweep's report, each a PNG with its units written on it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator
from scipy.interpolate import RBFInterpolator

from ctrl_ray.canvas import AFTER, BEFORE, FAINT, INK, new_figure
from ctrl_ray.tuning.results.trials import (
    Prediction,
    SweepTrial,
    finished_trials,
    pareto_front,
)

THEORY = "#b5402a"
_ENOUGH_SAMPLES = 20
_EXPONENT = "guidance_strength / kl_coef"
_MAP = "viridis"
_ROOM_FOR_A_LABEL = 0.035
_APART = 1.03


def plot_accuracy_map(path: Path, trials: Sequence[SweepTrial]) -> Path | None:
    """Accuracy over (kl_coef, guidance_strength), both logarithmic, with lines of equal exponent; None when neither of
    them varies or fewer than three trials finished."""
    done = [trial for trial in finished_trials(trials) if trial.kl_coef > 0 and trial.guidance_strength > 0]
    if len(done) < 3 or len({(trial.kl_coef, trial.guidance_strength) for trial in done}) < 3:
        return None
    x = np.log10([trial.kl_coef for trial in done])
    y = np.log10([trial.guidance_strength for trial in done])
    accuracy = np.array([trial.metrics["accuracy"] for trial in done])
    limits = [(values.min() - 0.12, values.max() + 0.12) for values in (x, y)]
    norm = Normalize(min(accuracy), max(max(accuracy), min(accuracy) + 0.05))
    with new_figure(path, 6.4, 5.0) as figure:
        axis = figure.subplots()
        if np.ptp(x) > 0 and np.ptp(y) > 0:
            axis.imshow(
                _surface(x, y, accuracy, limits),
                origin="lower",
                extent=(*limits[0], *limits[1]),
                aspect="auto",
                cmap=_MAP,
                norm=norm,
                alpha=0.75,
                interpolation="bilinear",
            )
        dots = axis.scatter(x, y, c=accuracy, cmap=_MAP, norm=norm, s=430, edgecolors="white", linewidths=1.2, zorder=3)
        for trial, left, up in zip(done, x, y):
            value = float(trial.metrics["accuracy"])
            ink = INK if norm(value) > 0.6 else "white"
            axis.text(left, up, f"{value:.2f}", fontsize=7.5, ha="center", va="center", color=ink, zorder=4)
        _draw_ratio_lines(axis, limits)
        axis.set_xlim(*limits[0])
        axis.set_ylim(*limits[1])
        _logarithmic_ticks(axis.xaxis, x)
        _logarithmic_ticks(axis.yaxis, y)
        axis.grid(visible=False)
        axis.set_xlabel("kl_coef (weight of the KL, logarithmic)")
        axis.set_ylabel("guidance_strength (weight of log p(y|x,c), logarithmic)")
        figure.colorbar(dots, ax=axis, label="accuracy (true class)")
    return path


def _surface(x: np.ndarray, y: np.ndarray, values: np.ndarray, limits: Sequence[tuple[float, float]]) -> np.ndarray:
    """Values between and around the trials, (60, 60): a thin interpolation, nearest trial where they lie on a line."""
    axes = [np.linspace(low, high, 60) for low, high in limits]
    grid = np.stack([axis.ravel() for axis in np.meshgrid(*axes)], axis=1)
    places, index = np.unique(np.stack([x, y], axis=1), axis=0, return_inverse=True)
    means = np.array([values[index.reshape(-1) == row].mean() for row in range(len(places))])
    degree = 0 if np.linalg.matrix_rank(places - places.mean(0), tol=1e-9) < 2 else 1
    answer = RBFInterpolator(places, means, kernel="linear", degree=degree)(grid)
    return np.clip(answer, values.min(), values.max()).reshape(60, 60)


def _draw_ratio_lines(axis: Any, limits: Sequence[tuple[float, float]]) -> None:
    (left, right), (bottom, top) = limits
    for exponent in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0):
        shift = math.log10(exponent)
        start, end = max(left, bottom - shift), min(right, top - shift)
        if end - start < 0.05:
            continue
        axis.plot([start, end], [start + shift, end + shift], color="white", linestyle="--", linewidth=1, zorder=2)
        place = start + 0.04 * (right - left)
        if place < end:
            axis.text(
                place,
                place + shift,
                f"exponent {exponent:g}",
                fontsize=7.5,
                color=INK,
                zorder=5,
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.2},
            )


def _logarithmic_ticks(axis: Any, values: np.ndarray) -> None:
    """Ticks at 1, 2, 5, … of an axis whose data are powers of ten."""
    candidates = [digit * 10.0**power for power in range(-9, 9) for digit in (1, 2, 5)]
    inside = [v for v in candidates if values.min() - 0.13 <= math.log10(v) <= values.max() + 0.13]
    ticks = inside or [round(10 ** float(values.mean()), 3)]
    axis.set_major_locator(FixedLocator([math.log10(v) for v in ticks]))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{10**v:.3g}"))


def plot_pareto(path: Path, trials: Sequence[SweepTrial], prediction: Prediction | None) -> Path | None:
    """Accuracy against KL: the trials by their exponent, the front that no trial beats, and the theory's curve, on which
    only the exponent counts; None when no trial finished."""
    done = finished_trials(trials)
    if not done:
        return None
    kl, accuracy, kl_error, accuracy_error = _columns(done)
    with new_figure(path, 6.4, 4.6) as figure:
        axis = figure.subplots()
        if prediction is not None:
            _draw_theory(axis, prediction)
        front = pareto_front(list(kl), list(accuracy))
        axis.plot(kl[front], accuracy[front], color=INK, linewidth=1.0, zorder=2, label="front: no trial beats these")
        axis.errorbar(
            kl,
            accuracy,
            xerr=2 * kl_error,
            yerr=2 * accuracy_error,
            fmt="none",
            ecolor=BEFORE,
            elinewidth=0.8,
            zorder=2,
        )
        _draw_trials(figure, axis, done, kl, accuracy)
        axis.set_xlabel("KL to the pre-trained model / nats")
        axis.set_ylabel("accuracy (true class)")
        axis.set_xlim(left=min(0.0, float(kl.min())), right=float(kl.max()) * 1.15 + 0.05)
        axis.set_ylim(min(0.2, float(accuracy.min()) - 0.05), 1.02)
        axis.legend(loc="lower right")
    return path


def plot_exponent(path: Path, trials: Sequence[SweepTrial], prediction: Prediction | None) -> Path | None:
    """KL over guidance_strength / kl_coef: theory says that nothing else counts, so trials of equal exponent (drawn side by
    side) should be level; None when fewer than two exponents finished."""
    done = [trial for trial in finished_trials(trials) if 0 < trial.exponent < math.inf]
    if len({f"{trial.exponent:.6g}" for trial in done}) < 2:
        return None
    kl, _, kl_error, _ = _columns(done)
    exponents = np.array([trial.exponent for trial in done])
    coefficients = np.array([trial.kl_coef for trial in done])
    with new_figure(path, 6.4, 4.2) as figure:
        axis = figure.subplots()
        if prediction is not None:
            shown = _reliable(prediction)
            axis.plot(
                prediction.exponents[shown], prediction.kl[shown], color=THEORY, linestyle="--", label=_THEORY_LABEL
            )
        places = _side_by_side(exponents)
        axis.errorbar(places, kl, yerr=2 * kl_error, fmt="none", ecolor=BEFORE, elinewidth=0.8, zorder=2)
        spread = coefficients.max() > coefficients.min()
        norm = LogNorm(coefficients.min(), coefficients.max()) if spread else Normalize(0, 1)
        dots = axis.scatter(places, kl, c=coefficients, cmap="cividis", norm=norm, s=46, edgecolors="white", zorder=3)
        if spread:
            _decimal_ticks(figure.colorbar(dots, ax=axis, label="kl_coef"), coefficients)
        axis.set_xscale("log")
        axis.set_xlim(exponents.min() / 1.25, exponents.max() * 1.25)
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(bottom=0, top=max(float(kl.max()) * 1.2, 0.1))
        axis.set_xlabel(f"{_EXPONENT} (logarithmic)")
        axis.set_ylabel("KL to the pre-trained model / nats")
        axis.legend(loc="upper left")
    return path


def _side_by_side(exponents: np.ndarray) -> np.ndarray:
    """The exponents, equal ones a little apart, so that no dot hides another."""
    places = exponents.astype(np.float64)
    keys = [f"{exponent:.6g}" for exponent in exponents]
    for key in set(keys):
        same = [index for index, other in enumerate(keys) if other == key]
        places[same] *= _APART ** (2.0 * np.arange(len(same)) - (len(same) - 1))
    return places


def plot_dial(
    path: Path,
    trials: Sequence[SweepTrial],
    source: SweepTrial,
    scales: Sequence[float],
    dial: Sequence[dict[str, float]],
) -> Path | None:
    """Accuracy against KL of one trained adapter at several scales, beside the separately trained trials.

    dial: {"accuracy", "kl"} for each of `scales`. None when there are no scales.
    """
    if not dial:
        return None
    done = finished_trials(trials)
    kl, accuracy, _, _ = _columns(done)
    points = np.array([(row["kl"], row["accuracy"]) for row in dial])
    with new_figure(path, 6.4, 4.4) as figure:
        axis = figure.subplots()
        label = f"adapter of trial {source.name} (exponent {source.exponent:.3g}), scaled"
        axis.plot(*points.T, color=THEORY, marker="D", markersize=5, linewidth=1.2, zorder=4, label=label)
        for scale, (x, y) in zip(scales, points):
            axis.annotate(f"{scale:g}", (x, y), xytext=(5, -12), textcoords="offset points", fontsize=7.5, color=THEORY)
        _draw_trials(figure, axis, done, kl, accuracy, label="trials, each trained for its exponent")
        highest = max(float(kl.max()), float(points[:, 0].max()))
        axis.set_xlim(0, highest * 1.12 + 0.05)
        axis.set_ylim(min(0.2, float(accuracy.min()) - 0.05), 1.02)
        axis.set_xlabel("KL to the pre-trained model / nats")
        axis.set_ylabel("accuracy (true class)")
        axis.legend(loc="lower right")
    return path


_THEORY_LABEL = "theory: the optimum, from samples of the pre-trained model"


def _draw_theory(axis: Any, prediction: Prediction) -> None:
    shown = _reliable(prediction)
    kl, accuracy = prediction.kl[shown], prediction.accuracy[shown]
    axis.plot(kl, accuracy, color=THEORY, linestyle="--", linewidth=1.3, zorder=1, label=_THEORY_LABEL)
    exponents, lowest = prediction.exponents[shown], -math.inf
    for exponent in (0.3, 1.0, 3.0, 10.0):
        if len(exponents) and exponents[0] <= exponent <= exponents[-1]:
            x, y = np.interp(exponent, exponents, kl), np.interp(exponent, exponents, accuracy)
            axis.plot([x], [y], marker="|", color=THEORY, markersize=9)
            if y < lowest + _ROOM_FOR_A_LABEL:
                continue
            lowest = y
            axis.annotate(
                f"exponent {exponent:g}", (x, y), xytext=(6, -9), textcoords="offset points", fontsize=7.5, color=THEORY
            )


def _reliable(prediction: Prediction) -> np.ndarray:
    return prediction.effective_samples >= _ENOUGH_SAMPLES


def _draw_trials(
    figure: Any, axis: Any, done: Sequence[SweepTrial], kl: np.ndarray, accuracy: np.ndarray, *, label: str = ""
) -> None:
    """Dots coloured by exponent, with the trials' names where there is room."""
    if label:
        axis.scatter([], [], color=BEFORE, s=46, label=label)
    exponents = np.array([trial.exponent for trial in done])
    known = np.isfinite(exponents) & (exponents > 0)
    if known.any() and exponents[known].max() > exponents[known].min():
        norm = LogNorm(exponents[known].min(), exponents[known].max())
        dots = axis.scatter(
            kl[known], accuracy[known], c=exponents[known], cmap=_MAP, norm=norm, s=46, edgecolors="white", zorder=3
        )
        _decimal_ticks(figure.colorbar(dots, ax=axis, label=_EXPONENT), exponents[known])
    else:
        axis.scatter(kl, accuracy, color=AFTER, s=46, edgecolors="white", zorder=3)
    if len(done) <= 24:
        for names, x, y in _labels(done, kl, accuracy):
            axis.annotate(names, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=7, color=INK, zorder=5)


def _labels(done: Sequence[SweepTrial], kl: np.ndarray, accuracy: np.ndarray) -> list[tuple[str, float, float]]:
    """Names of the trials with their places; those that nearly coincide share one label."""
    reach = 0.03 * max(float(kl.max()), 1e-9)
    labels: list[tuple[list[str], float, float]] = []
    for index in np.argsort(kl, kind="stable"):
        name = done[index].name.lstrip("0") or "0"
        if labels and kl[index] - labels[-1][1] < reach and abs(accuracy[index] - labels[-1][2]) < 0.03:
            labels[-1][0].append(name)
        else:
            labels.append(([name], float(kl[index]), float(accuracy[index])))
    return [(", ".join(names), x, y) for names, x, y in labels]


def _decimal_ticks(bar: Any, values: np.ndarray) -> None:
    """Plain numbers at 1, 2, 5, … of a logarithmic colour bar."""
    candidates = [digit * 10.0**power for power in range(-9, 9) for digit in (1, 2, 5)]
    ticks = [v for v in candidates if values.min() * 0.999 <= v <= values.max() * 1.001] or [float(np.median(values))]
    bar.set_ticks(ticks, labels=[f"{v:g}" for v in ticks])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.outline.set_edgecolor(FAINT)


def _columns(done: Sequence[SweepTrial]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """KL, accuracy and their standard errors (0 where unknown)."""
    names = ("kl", "accuracy", "kl_error", "accuracy_error")
    kl, accuracy, kl_error, accuracy_error = (
        np.array([trial.metric(name) or 0.0 for trial in done], dtype=np.float64) for name in names
    )
    return kl, accuracy, kl_error, accuracy_error
