"""The stages of a comparison, in order: classifiers, exact samples, then each method; and what is written at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrl_ray.cluster.connection import connected
from ctrl_ray.comparison import figures, report
from ctrl_ray.comparison.bench import TIMED_IMAGES, Bench, Question
from ctrl_ray.comparison.classifiers import offline_classifiers, with_classifiers
from ctrl_ray.comparison.plan import held_out_prompts
from ctrl_ray.comparison.results import CRITERION, verdicts
from ctrl_ray.comparison.side_by_side import train_side_by_side
from ctrl_ray.comparison.training import Train, run_config
from ctrl_ray.comparison.windows import windows_of
from ctrl_ray.offline.prompts import training_prompts
from ctrl_ray.planning.preflight import preflight
from ctrl_ray.reporting.facts import environment_facts


def run_comparison(question: Question, train: Train, say: Callable[[str], None]) -> dict[str, Any]:
    """Run it all and write results.json, the report and its pictures; returns what results.json holds.

    train: `training.Train`. What is drawn, fitted and trained is kept below the folder: the same question, asked again, goes on
    from there.
    """
    started = time.monotonic()
    if question.plan.held_out:
        held_out_prompts(training_prompts(question.config))  # whether that can be, before hours have gone
    say(question.plan.to_text())
    with connected():
        folders = offline_classifiers(question.config, question.folder / "classifier", question.classifiers)
        _check_runs(question, folders)
        bench = Bench.made(question, folders, say)
        train_side_by_side(bench.all_runs(), bench.at_a_time, say)
        rows = []
        reached = 0.0
        for plan in question.plan.methods:
            rows.append(bench.method_row(plan, train))
            reached += plan.units
            bench.progress.reached(reached)
            say(_line(rows[-1]))
        held_out = bench.held_out(rows, train) if question.plan.held_out else None
        windows = [] if question.plan.quick else windows_of(bench, rows)
        difference = bench.shipped_difference()
    results = {
        "preset": question.preset,
        "command": question.command,
        "exponents": bench.exponents,
        "criterion": CRITERION,
        "num_values": max(len(plan.values) for plan in question.plan.methods),
        "common_test": question.plan.common_test,
        "batch_size": TIMED_IMAGES,
        "runs_at_a_time": bench.at_a_time,
        "seed": question.seed,
        "pool": {
            "samples": len(bench.target.pool.samples),
            "exact": {
                joint.name: int(accepted.sum())
                for joint, accepted in zip(bench.target.classes, bench.target.pool.accepted, strict=True)
            },
        },
        "classifiers": difference,
        "methods": rows,
        "held_out": held_out,
        "windows": windows,
        "verdicts": verdicts(rows),
        "facts": environment_facts(),
        "seconds": time.monotonic() - started,
    }
    results["figures"] = draw_figures(question.folder, rows, bench)
    return report.write(question.folder, results, report.markdown, report.page)


def _check_runs(question: Question, folders: Mapping[str, str]) -> None:
    """The errors that a run of any method would begin with, before anything is drawn."""
    config = with_classifiers(question.config, folders)
    for plan in question.plan.methods:
        if plan.seeds:
            assert plan.method.training is not None
            preflight(run_config(config, plan.method.training, question.folder / "runs" / plan.name, plan.seeds[0]))


def _line(row: Mapping[str, Any]) -> str:
    """What a method came to, for the terminal."""
    test, worst = row["test"], row["test"]["distance"]["worst"]
    accuracy = "" if test["accuracy"] is None else f"accuracy {test['accuracy']:.3f}, "
    knob = "" if row["knob"] is None else f" with {row['knob']} {row['chosen']:g}"
    distance = "distance unknown" if worst is None else f"{worst:.2f} noise floors in the worst class"
    return f"{row['title']}{knob}: {accuracy}{distance}, {row['cost']['ratio']:.2f} × plain sampling"


def draw_figures(folder: Path, rows: Sequence[Mapping[str, Any]], bench: Bench) -> dict[str, str]:
    """Title to file name, of the pictures that the numbers allow."""
    titles = list(report.CAPTIONS)
    drawn = {
        titles[0]: figures.plot_accuracy(folder / "accuracy.png", rows),
        titles[1]: figures.plot_distance_to_target(folder / "distance.png", rows),
    }
    name, control = next(iter(bench.config.controls.items()))
    drawn[titles[2]] = figures.plot_grid(folder / "samples.png", bench.shown, name, control, 0)
    return {title: path.name for title, path in drawn.items() if path is not None}
