"""Finished runs side by side: what a larger guidance_strength / kl_coef gains in accuracy and costs in KL."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ctrl_ray.config.json import train_config_from_json
from ctrl_ray.errors import DataError
from ctrl_ray.reporting.figures import AFTER, BEFORE, new_figure

FIGURE = "guidance.png"


@dataclass(frozen=True)
class RunFigures:
    """What a finished run reports after fine-tuning."""

    name: str
    exponent: float
    """guidance_strength / kl_coef of its first control."""
    accuracy: float
    accuracy_error: float
    """Standard error."""
    kl: float
    """Nats."""
    kl_error: float
    prompt_fidelity: float | None
    diversity: float | None
    accuracy_before: float


def read_run(folder: str | Path) -> RunFigures:
    """The figures of RUN/report/summary.json; DataError when the run is not finished or not judged by an oracle."""
    run = Path(folder)
    config_file, summary_file = run / "config.json", run / "report" / "summary.json"
    for file in (config_file, summary_file):
        if not file.is_file():
            raise DataError(f"{file} does not exist; expected the folder of a finished run of ctrl_ray.train")
    config = train_config_from_json(config_file.read_text(encoding="utf-8"), source=str(config_file))
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    after = summary["after"]
    if after["accuracy"] is None:
        raise DataError(f"{summary_file} has no accuracy: no control of the run has an oracle; compare other runs")
    control = next(iter(config.controls.values()))
    return RunFigures(
        name=run.name,
        exponent=control.guidance_strength / config.kl_coef if config.kl_coef else math.inf,
        accuracy=after["accuracy"],
        accuracy_error=after["standard_errors"]["accuracy"],
        kl=after["kl"],
        kl_error=after["standard_errors"]["kl"],
        prompt_fidelity=after["prompt_fidelity"],
        diversity=after["diversity"],
        accuracy_before=summary["before"]["accuracy"],
    )


def is_monotone(values: Sequence[float], errors: Sequence[float]) -> bool:
    """Whether no value falls below the one before it by more than two standard errors of their difference."""
    pairs = zip(values, values[1:], errors, errors[1:], strict=False)
    return all(later - earlier >= -2 * math.hypot(e, f) for earlier, later, e, f in pairs)


def format_runs(runs: Sequence[RunFigures]) -> str:
    """A table in the order of the exponent, and whether accuracy and KL rise with it."""
    lines = [f"{'run':<24} {'γ / kl_coef':>11} {'accuracy':>16} {'KL / nats':>14} {'fidelity':>9} {'diversity':>10}"]
    for run in runs:
        optional = [f"{value:.3f}" if value is not None else "–" for value in (run.prompt_fidelity, run.diversity)]
        lines.append(
            f"{run.name:<24} {run.exponent:11g} {run.accuracy:8.3f} ± {run.accuracy_error:.3f} {run.kl:7.2f} ± "
            f"{run.kl_error:4.2f} {optional[0]:>9} {optional[1]:>10}"
        )
    for name in ("accuracy", "kl"):
        rises = is_monotone([getattr(r, name) for r in runs], [getattr(r, f"{name}_error") for r in runs])
        lines.append(f"{name} rises with it, within two standard errors: {'yes' if rises else 'NO'}")
    return "\n".join(lines)


def plot_runs(path: Path, runs: Sequence[RunFigures]) -> Path:
    """Accuracy and KL over the exponent, with two standard errors, and accuracy over KL."""
    exponents = [run.exponent for run in runs]
    accuracy, kl = [run.accuracy for run in runs], [run.kl for run in runs]
    accuracy_bars, kl_bars = [2 * run.accuracy_error for run in runs], [2 * run.kl_error for run in runs]
    style = {"color": AFTER, "marker": "o", "markersize": 4, "linewidth": 1.3, "capsize": 3}
    before = sum(run.accuracy_before for run in runs) / len(runs)
    with new_figure(path, 8.6, 2.7) as figure:
        axes = figure.subplots(1, 3)
        axes[0].errorbar(exponents, accuracy, yerr=accuracy_bars, **style)
        axes[1].errorbar(exponents, kl, yerr=kl_bars, **style)
        axes[2].errorbar(kl, accuracy, xerr=kl_bars, yerr=accuracy_bars, **style)
        for axis in axes[:2]:
            axis.set_xscale("log")
            axis.set_xticks(exponents, [f"{value:g}" for value in exponents])
            axis.minorticks_off()
            axis.set_xlabel("guidance_strength / kl_coef")
        for axis in (axes[0], axes[2]):
            axis.axhline(before, color=BEFORE, linestyle="--", linewidth=1)
            axis.set_ylim(0, 1)
            axis.set_ylabel("accuracy (true class)")
        axes[2].set_xlabel("KL / nats")
        axes[1].set_ylabel("KL / nats")
        axes[1].set_ylim(bottom=0)
        axes[0].annotate("pre-trained", (exponents[0], before), xytext=(0, 4), textcoords="offset points", fontsize=8)
        for run in runs:
            axes[2].annotate(
                f"{run.exponent:g}", (run.kl, run.accuracy), xytext=(5, -10), textcoords="offset points", fontsize=8
            )
    return path


def compare_runs(folders: Sequence[str | Path], output_dir: str | Path) -> tuple[list[RunFigures], Path]:
    """Read the runs, sort them by exponent, draw the picture; DataError for fewer than two."""
    if len(folders) < 2:
        raise DataError(f"{len(folders)} runs cannot be compared; give at least two run folders")
    runs = sorted((read_run(folder) for folder in folders), key=lambda run: run.exponent)
    return runs, plot_runs(Path(output_dir) / FIGURE, runs)
