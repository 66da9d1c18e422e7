"""The end of a sweep: results.json, the pictures, and one page that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ctrl_ray.reporting.markup import ReportFigure
from ctrl_ray.reporting.report import grid_line
from ctrl_ray.reporting.sample_grid import plot_sample_grid
from ctrl_ray.tuning.results import figures as sweep_figures
from ctrl_ray.tuning.results.findings import SweepFindings
from ctrl_ray.tuning.results.page import sweep_page
from ctrl_ray.tuning.results.parallel_figure import plot_parallel
from ctrl_ray.tuning.results.trials import (
    Prediction,
    SweepTrial,
    equal_exponents,
    exponent_correlation,
    finished_trials,
    predict_optimum,
)

PAGE_FILE, RESULTS_FILE, FIGURES = "report.html", "results.json", "figures"
_COLUMNS = 8


def write_sweep_report(folder: Path, findings: SweepFindings) -> tuple[Path, dict[str, Path]]:
    """Write results.json, figures/*.png and report.html into `folder`; returns the page and the figures by title."""
    figures = draw_figures(folder / FIGURES, findings)
    results = json.dumps(sweep_results(findings), indent=2, allow_nan=False)
    (folder / RESULTS_FILE).write_text(results + "\n", encoding="utf-8")
    page = folder / PAGE_FILE
    page.write_text(sweep_page(findings, figures), encoding="utf-8")
    return page, {figure.title: figure.path for figure in figures}


def sweep_results(findings: SweepFindings) -> dict[str, Any]:
    """The content of results.json: every trial, and how well the theory's word on the exponent holds."""
    return {
        "sweep": findings.name,
        "best": None if findings.best is None else findings.best.name,
        "rank_correlation_of_exponent_and_kl": exponent_correlation(findings.trials),
        "equal_exponents": [
            {
                "exponent": pair.exponent,
                "trials": pair.names,
                "kl": pair.kl,
                "allowed": pair.allowed,
                "agree": pair.agree,
            }
            for pair in equal_exponents(findings.trials)
        ],
        "trials": [_plain(trial) for trial in findings.trials],
        "dial": {
            "trial": None if findings.dial_of is None else findings.dial_of.name,
            "scales": [{"scale": scale, **row} for scale, row in findings.dial.items()],
        },
    }


def _plain(trial: SweepTrial) -> dict[str, Any]:
    names = ["accuracy", "accuracy_error", "macro_f1", "prompt_fidelity", "kl", "kl_error", "diversity", "belief_gap"]
    names += ["gap", "gap_error", *sorted(name for name in trial.metrics if name.startswith("accuracy/"))]
    return {
        "name": trial.name,
        "status": trial.status,
        "knobs": dict(trial.knobs),
        "exponent": trial.exponent if trial.kl_coef else None,
        "updates_done": trial.updates_done,
        **{name: trial.metric(name) for name in names},
        "seconds": round(trial.seconds, 1),
        "error": trial.error or None,
    }


def predict(findings: SweepFindings) -> Prediction | None:
    """The optimum for exponents from 0.1 to 30; None with several controls, or where nothing measures the truth."""
    if len(findings.controls) != 1:
        return None
    [name] = findings.controls
    classes = findings.before.judged["per_sample"]["classes"].get(name)
    if classes is None:
        return None
    log_probs = findings.before.samples.class_log_probs[name]
    return predict_optimum(log_probs, classes, np.geomspace(0.1, 30, 61))


def draw_figures(folder: Path, findings: SweepFindings) -> list[ReportFigure]:
    """Every picture that the trials allow."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    trials, prediction = findings.trials, predict(findings)
    drawn = [
        (
            "Accuracy by strength and price",
            "Each dot is a finished trial with its accuracy; the colours between them are interpolated. Dashed: equal exponent "
            "guidance_strength / kl_coef.",
            sweep_figures.plot_accuracy_map(folder / "accuracy_map.png", trials),
        ),
        (
            "Accuracy against KL",
            "What accuracy costs in distance from the pre-trained model; numbers are trials, bars two standard errors. "
            + _theory_words(prediction),
            sweep_figures.plot_pareto(folder / "pareto.png", trials, prediction),
        ),
        (
            "Does only the exponent count?",
            "At the optimum KL depends on guidance_strength / kl_coef alone: trials of equal exponent, drawn side by side, "
            "should be level. A short run is not at the optimum yet: it pays more KL than theory asks, or gets there in part.",
            sweep_figures.plot_exponent(folder / "exponent.png", trials, prediction),
        ),
        (
            "All trials at once",
            "One line for each finished trial, from its settings to its results; the colour is the accuracy.",
            plot_parallel(folder / "parallel.png", trials, findings.knobs),
        ),
        ("Samples", _grid_words(findings), _plot_samples(folder / "samples.png", findings)),
    ]
    if findings.dial_of is not None:
        drawn.append(
            (
                "The cheap dial: one adapter, scaled",
                "Diamonds: the adapter of one trial with LoRA and control embeddings scaled as written, without any training "
                "(sample --adapter-scale). Dots: trials trained for their own exponent. " + dial_words(findings),
                sweep_figures.plot_dial(
                    folder / "dial.png",
                    trials,
                    findings.dial_of,
                    list(findings.dial),
                    [dict(row) for row in findings.dial.values()],
                ),
            )
        )
    wide = ("Samples", "All trials at once")
    return [ReportFigure(title, words, path, title in wide) for title, words, path in drawn if path is not None]


def _theory_words(prediction: Prediction | None) -> str:
    if prediction is None:
        return "The theory's curve is left out: it needs one control with an oracle."
    return (
        "Dashed: the theory's optimum p(x) p(y|x)^exponent, by importance weights over samples of the pre-trained model, as "
        "far as those can tell; only the exponent counts there."
    )


def _grid_words(findings: SweepFindings) -> str:
    trials = ", ".join(f"{trial.exponent:.3g}: trial {trial.name}" for trial, _ in findings.shown.values())
    return (
        "The best trial and the two extremes of the exponent guidance_strength / kl_coef, with the same prompts and noise in "
        f"each column. Ratio {trials}. Beneath each image: the measured value."
    )


def dial_words(findings: SweepFindings) -> str:
    """How far the scaled adapter stands in for training: its accuracy against that of trained trials of equal KL."""
    gaps = dial_gaps(findings)
    if not gaps:
        return ""
    worst = min(gaps, key=lambda row: row["gap"])
    return (
        f"At equal KL its accuracy differs from the trained trials' by {np.mean([row['gap'] for row in gaps]):+.3f} on average "
        f"and by {worst['gap']:+.3f} at worst (scale {worst['scale']:g})."
    )


def dial_gaps(findings: SweepFindings) -> list[dict[str, float]]:
    """For each scale within the range of the trained trials' KL: its accuracy minus theirs at that KL (interpolated)."""
    done = sorted(finished_trials(findings.trials), key=lambda trial: trial.metrics["kl"])
    if len(done) < 2:
        return []
    kl, accuracy = ([trial.metrics[name] for trial in done] for name in ("kl", "accuracy"))
    inside = [(scale, row) for scale, row in findings.dial.items() if kl[0] <= row["kl"] <= kl[-1] and scale != 1]
    return [
        {"scale": scale, "gap": row["accuracy"] - float(np.interp(row["kl"], kl, accuracy))} for scale, row in inside
    ]


def _plot_samples(path: Path, findings: SweepFindings) -> Path | None:
    if not findings.shown:
        return None
    [name, control], column = next(iter(findings.controls.items())), 0
    rows = []
    for index, class_name in enumerate(control.class_names):
        lines = []
        mine = np.flatnonzero(findings.before.samples.labels[:, column] == index)[:_COLUMNS]
        if not len(mine):
            continue
        for title, evaluation in {"before": findings.before, **{k: e for k, (_, e) in findings.shown.items()}}.items():
            lines.append(grid_line(title, evaluation, mine, name, index))
        unit = f" {control.unit}" if control.unit else ""
        rows.append((f"{name}, class {index}: {class_name}{unit}", lines))
    return plot_sample_grid(path, rows)
