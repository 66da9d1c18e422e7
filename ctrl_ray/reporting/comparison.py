"""Finished runs side by side: what a larger guidance_strength / kl_coef gains in accuracy and costs in KL."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrl_ray.canvas import AFTER, BEFORE, new_figure
from ctrl_ray.config.json import read_train_config
from ctrl_ray.errors import DataError
from ctrl_ray.wording import text_table

FIGURE = "guidance.png"
_LINE: Any = {"marker": "o", "markersize": 4, "linewidth": 1.3, "capsize": 3}


@dataclass(frozen=True)
class ControlFigures:
    """One control of a finished run."""

    exponent: float
    """guidance_strength / kl_coef."""
    accuracy: float | None
    """None: nothing measures the truth."""
    accuracy_error: float | None
    """Standard error."""
    accuracy_before: float | None


@dataclass(frozen=True)
class RunFigures:
    """What a finished run reports after fine-tuning."""

    name: str
    controls: Mapping[str, ControlFigures]
    accuracy: float
    """The mean over the controls that are judged."""
    accuracy_error: float
    """Standard error."""
    kl: float
    """Nats."""
    kl_error: float
    gap: float | None
    """Nats from the target; None: not known."""
    gap_error: float | None
    prompt_fidelity: float | None
    diversity: float | None

    @property
    def exponent(self) -> float:
        """guidance_strength / kl_coef of its first control."""
        return next(iter(self.controls.values())).exponent


def read_run(folder: str | Path) -> RunFigures:
    """The figures of RUN/report/summary.json; DataError when the run is not finished or not judged by an oracle."""
    run = Path(folder)
    config_file, summary_file = run / "config.json", run / "report" / "summary.json"
    for file in (config_file, summary_file):
        if not file.is_file():
            raise DataError(f"{file} does not exist; expected the folder of a finished run of ctrl_ray.train")
    config = read_train_config(config_file)
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    after, before = summary["after"], summary["before"]
    if after["accuracy"] is None:
        raise DataError(f"{summary_file} has no accuracy: no control of the run has an oracle; compare other runs")
    controls = {
        name: ControlFigures(
            exponent=control.guidance_strength / config.kl_coef if config.kl_coef else math.inf,
            accuracy=after["controls"][name]["accuracy"],
            accuracy_error=after["controls"][name]["standard_errors"]["accuracy"],
            accuracy_before=before["controls"][name]["accuracy"],
        )
        for name, control in config.controls.items()
    }
    return RunFigures(
        name=run.name,
        controls=controls,
        accuracy=after["accuracy"],
        accuracy_error=after["standard_errors"]["accuracy"],
        kl=after["kl"],
        kl_error=after["standard_errors"]["kl"],
        gap=after.get("gap"),
        gap_error=after.get("gap_standard_error"),
        prompt_fidelity=after["prompt_fidelity"],
        diversity=after["diversity"],
    )


def is_monotone(values: Sequence[float], errors: Sequence[float]) -> bool:
    """Whether no value falls below the one before it by more than two standard errors of their difference."""
    pairs = zip(values, values[1:], errors, errors[1:], strict=False)
    return all(later - earlier >= -2 * math.hypot(e, f) for earlier, later, e, f in pairs)


def format_runs(runs: Sequence[RunFigures]) -> str:
    """A table in the order of the exponent, every control for itself with the mean beside, and whether accuracy and KL rise
    with the exponents that differ."""
    names = control_names(runs)
    with_gap = any(run.gap is not None for run in runs)
    head = ["run"]
    for name in names:
        of = f" of {name}" if len(names) > 1 else ""
        head += [f"γ / kl_coef{of}", f"accuracy{of}"]
    head += ["mean accuracy"] * (len(names) > 1) + ["gap / nats"] * with_gap
    head += ["KL / nats", "fidelity", "diversity"]
    rows = [head]
    for run in runs:
        cells = [run.name]
        for name in names:
            control = run.controls.get(name)
            cells.append("–" if control is None else f"{control.exponent:g}")
            cells.append("–" if control is None else _with_error(control.accuracy, control.accuracy_error, 3))
        cells += [_with_error(run.accuracy, run.accuracy_error, 3)] * (len(names) > 1)
        cells += [_with_error(run.gap, run.gap_error, 2)] * with_gap + [_with_error(run.kl, run.kl_error, 2)]
        cells += [_with_error(value, None, 3) for value in (run.prompt_fidelity, run.diversity)]
        rows.append(cells)
    return "\n".join([text_table(rows), *_trends(runs, names)])


def control_names(runs: Sequence[RunFigures]) -> list[str]:
    """Every control that a run has, in order of appearance."""
    return list(dict.fromkeys(name for run in runs for name in run.controls))


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _trends(runs: Sequence[RunFigures], names: Sequence[str]) -> list[str]:
    """Whether a control's accuracy rises with its exponent, for those whose exponent differs between runs; and the KL, where
    it is one control's alone that does."""
    varying = [name for name in names if len({run.controls[name].exponent for run in runs if name in run.controls}) > 1]
    trends = {}
    for name in varying:
        own = sorted((run for run in runs if name in run.controls), key=lambda run: run.controls[name].exponent)
        of = f" of {name}" if len(names) > 1 else ""
        known = [
            (control.accuracy, control.accuracy_error)
            for control in (run.controls[name] for run in own)
            if control.accuracy is not None and control.accuracy_error is not None
        ]
        trends[f"accuracy{of}"] = is_monotone(*zip(*known, strict=True)) if known else True
        if len(varying) == 1:
            trends["kl"] = is_monotone([run.kl for run in own], [run.kl_error for run in own])
    return [f"{name} rises with it, within two standard errors: {'yes' if up else 'NO'}" for name, up in trends.items()]


def plot_runs(path: Path, runs: Sequence[RunFigures]) -> Path:
    """Accuracy and KL over the exponent, with two standard errors, and accuracy over KL; a line for each control."""
    names = control_names(runs)
    with new_figure(path, 8.6, 2.7 if len(names) == 1 else 3.0) as figure:
        axes = figure.subplots(1, 3)
        for index, name in enumerate(names):
            colour = AFTER if index == 0 else f"C{index}"
            _draw_control(axes, runs, name, colour, first=index == 0, alone=len(names) == 1)
        exponents, kl = [run.exponent for run in runs], [run.kl for run in runs]
        axes[1].errorbar(exponents, kl, yerr=[2 * run.kl_error for run in runs], color=AFTER, **_LINE)
        ticks = {0: sorted({c.exponent for run in runs for c in run.controls.values()}), 1: exponents}
        for index, values in ticks.items():
            axes[index].set_xscale("log")
            axes[index].set_xticks(values, [f"{value:g}" for value in values])
            axes[index].minorticks_off()
            axes[index].set_xlabel("guidance_strength / kl_coef")
        if len(names) > 1:
            axes[1].set_xlabel(f"guidance_strength / kl_coef of {names[0]}")
            figure.legend(loc="outside lower center", ncols=len(names), handles=axes[0].get_legend_handles_labels()[0])
        for axis in (axes[0], axes[2]):
            axis.set_ylim(0, 1)
            axis.set_ylabel("accuracy (true class)")
        axes[2].set_xlabel("KL / nats")
        axes[1].set_ylabel("KL / nats")
        axes[1].set_ylim(bottom=0)
    return path


def _draw_control(
    axes: Sequence[Any], runs: Sequence[RunFigures], name: str, colour: str, *, first: bool, alone: bool
) -> None:
    """Its accuracy over its exponent and over the KL, and dashed what the pre-trained model has; the first one has words."""
    own = [
        (run, run.controls[name])
        for run in sorted(runs, key=lambda run: run.controls[name].exponent if name in run.controls else math.inf)
        if name in run.controls and run.controls[name].accuracy is not None
    ]
    if not own:
        return
    exponents, accuracy = [control.exponent for _, control in own], [control.accuracy for _, control in own]
    bars = [2 * (control.accuracy_error or 0.0) for _, control in own]
    kl, kl_bars = [run.kl for run, _ in own], [2 * run.kl_error for run, _ in own]
    axes[0].errorbar(exponents, accuracy, yerr=bars, color=colour, label=None if alone else name, **_LINE)
    axes[2].errorbar(kl, accuracy, xerr=kl_bars, yerr=bars, color=colour, **_LINE)
    before = [control.accuracy_before for _, control in own if control.accuracy_before is not None]
    if before:
        level = sum(before) / len(before)
        for axis in (axes[0], axes[2]):
            axis.axhline(level, color=BEFORE if alone else colour, linestyle="--", linewidth=1)
        if first:
            axes[0].annotate(
                "pre-trained", (exponents[0], level), xytext=(0, 4), textcoords="offset points", fontsize=8
            )
    for exponent, x, y in zip(exponents, kl, accuracy, strict=True) if first else ():
        axes[2].annotate(f"{exponent:g}", (x, y), xytext=(5, -10), textcoords="offset points", fontsize=8)


def compare_runs(folders: Sequence[str | Path], output_dir: str | Path) -> tuple[list[RunFigures], Path]:
    """Read the runs, sort them by exponent, draw the picture; DataError for fewer than two."""
    if len(folders) < 2:
        raise DataError(f"{len(folders)} runs cannot be compared; give at least two run folders")
    runs = sorted((read_run(folder) for folder in folders), key=lambda run: run.exponent)
    return runs, plot_runs(Path(output_dir) / FIGURE, runs)
