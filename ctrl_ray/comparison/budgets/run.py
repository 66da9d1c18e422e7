"""A comparison over label budgets, from the first classifier to the report."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ctrl_ray.classifiers.calibration import calibration_metrics
from ctrl_ray.classifiers.classifier import SETTINGS, ImageClassifier
from ctrl_ray.cluster.connection import connected
from ctrl_ray.comparison.bench import Bench, Question, Source
from ctrl_ray.comparison.budgets import figure, report
from ctrl_ray.comparison.budgets.lines import LINES, BudgetPlan, Line, fitting_config
from ctrl_ray.comparison.budgets.needed import label_ratios
from ctrl_ray.comparison.classifiers import offline_classifiers, with_classifiers
from ctrl_ray.comparison.methods import METHODS
from ctrl_ray.comparison.plan import MethodPlan
from ctrl_ray.comparison.report import write
from ctrl_ray.comparison.results import CRITERION, over_seeds
from ctrl_ray.comparison.side_by_side import sharing, train_side_by_side
from ctrl_ray.comparison.training import Train, TrainedRun, noised_runs, run_config, trained_run
from ctrl_ray.config import TrainConfig
from ctrl_ray.config.json import to_json
from ctrl_ray.driver.classifier import fit_classifier
from ctrl_ray.evaluation.judging import oracle_labels
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.offline.prompts import training_prompts
from ctrl_ray.policy.decoder import to_pixels
from ctrl_ray.policy.pipeline_sampler import PipelineSampler
from ctrl_ray.reporting.facts import environment_facts
from ctrl_ray.runs.files import write_whole


def run_budgets(question: Question, budgets: BudgetPlan, train: Train, say: Callable[[str], None]) -> dict[str, Any]:
    """Run it all and write results.json, the report and its picture; returns what results.json holds.

    The target is that of classifiers fitted on all labelled images of the preset (or given): every line is judged by how near
    it comes to what all labels would give. train: `training.Train`. What is drawn, fitted and trained is kept below the folder:
    the same question, asked again, goes on from there. So are the rows, small files: machines can share the budgets among
    them, and one that has all their rows writes the report of all.
    """
    started = time.monotonic()
    say(budgets.to_text())
    with connected():
        folders = offline_classifiers(question.config, question.folder / "classifier", question.classifiers)
        bench = Bench.made(question, folders, say)
        numbers, plain = bench.test(budgets.plain, 1.0, [Source()])
        lines = [_Row(bench, budgets, line, n, plain, train) for line in budgets.lines for n in budgets.budgets]
        if bench.at_a_time > 1:
            train_side_by_side([run for line in lines for run in line.runs()], bench.at_a_time, say)
        rows = []
        for each in lines:
            rows.append(each.kept())
            say(report.line_of(rows[-1]))
    results = {
        "preset": question.preset,
        "command": question.command,
        "exponents": bench.exponents,
        "criterion": CRITERION,
        "budgets": list(budgets.budgets),
        "num_seeds": len(budgets.seeds),
        "common_test": question.plan.common_test,
        "seed": question.seed,
        "pre_trained": over_seeds(numbers),
        "rows": rows,
        "ratios": ratios_of(budgets, rows),
        "facts": environment_facts(),
        "seconds": time.monotonic() - started,
    }
    picture = figure.plot_budgets(question.folder / "label_budgets.png", results)
    results["figures"] = {} if picture is None else {figure.TITLE: picture.name}
    return write(question.folder, results, report.markdown, report.page)


def ratios_of(budgets: BudgetPlan, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Of each other line the labels that it needs for CTRL's distance, with the seeds that it has; only where all distances are
    known."""
    worst: dict[str, list[list[float]]] = {}
    for line in budgets.lines:
        each = [[seed["common_distance"]["worst"] for seed in row["seeds"]] for row in rows if row["line"] == line]
        if all(value is not None for values in each for value in values):
            worst[line] = each
    ours = worst.get("ctrl")
    if ours is None:
        return {}
    return {
        line: label_ratios(budgets.budgets, [each[: len(theirs[0])] for each in ours], theirs)
        for line, theirs in worst.items()
        if LINES[line].method != "ctrl"
    }


@dataclasses.dataclass(frozen=True)
class _Row:
    """One line at one budget."""

    bench: Bench
    budgets: BudgetPlan
    name: str
    budget: int
    plain: EvaluationSamples
    """The pre-trained model's test images, which judge the classifiers."""
    train: Train

    @property
    def line(self) -> Line:
        return LINES[self.name]

    @property
    def plan(self) -> MethodPlan:
        """Of the budgets' plan."""
        return self.budgets.of(self.name, self.budget)

    @property
    def file(self) -> Path:
        """Where it is kept when it is made: named by what was asked, not by the machine or the files there, so that another
        machine can take it over."""
        question, plan = self.bench.question, self.plan
        asked = (
            to_json(fitting_config(question.config, self.line, self.budget, 0)),
            *(dict(question.classifiers), question.seed, question.plan.common_test),
            *(plan.values, dataclasses.astuple(plan.counts), plan.seeds),
        )
        key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
        return question.folder / "rows" / f"{plan.name}-{key}.json"

    def kept(self) -> dict[str, Any]:
        """The row of results.json: that in its file, or one that is made now."""
        if not self.file.is_file():
            made = json.dumps(self._made(), indent=2) + "\n"
            self.file.parent.mkdir(exist_ok=True)
            write_whole(self.file, made)
        row: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        return row

    def _made(self) -> dict[str, Any]:
        """Fit, train, choose the knob's value over the seeds, test."""
        plan = self.plan
        runs: list[TrainedRun] = []
        sources, calibration = [], []
        for seed in plan.seeds:
            source, own, figures = self._source(seed)
            sources.append(source)
            runs += own
            calibration.append(figures)
        value, validation = self.bench.choose(plan, sources)
        numbers, _ = self.bench.test(plan, value, sources)
        return {
            "line": self.name,
            "title": self.line.title,
            "budget": self.budget,
            "knob": plan.method.knob,
            "chosen": value,
            "validation": validation,
            "test": over_seeds(numbers),
            "seeds": numbers,
            "calibration": calibration,
            "training": [dataclasses.asdict(run) for run in runs],
        }

    def _source(self, seed: int) -> tuple[Source, list[TrainedRun], dict[str, Any]]:
        """What one seed trains, and the figures of its classifiers, by control."""
        folder, say = self.bench.question.folder, self.bench.say
        config = fitting_config(self.bench.question.config, self.line, self.budget, seed)
        say(f"{self.line.title}: {self.budget} images, seed {seed}")
        if METHODS[self.line.method].training is None:
            runs = noised_runs(config, folder / "noised" / f"{self.name}-{self.budget}-{seed}", say)
            return Source.of(runs), list(runs.values()), {}
        given = self._run(seed)
        run = trained_run(given, self.train)
        folders = {name: str(control.classifier) for name, control in given.controls.items()}
        figures = self._figures(folders) if self.line.method == "ctrl" else {}
        return Source(run.adapter), [run], figures

    def runs(self) -> list[TrainConfig]:
        """Of all seeds, with classifiers that are fitted; [] where nothing is to be trained."""
        if METHODS[self.line.method].training is None or self.file.is_file():
            return []
        return [self._run(seed) for seed in self.plan.seeds]

    def _run(self, seed: int) -> TrainConfig:
        bench, training = self.bench, METHODS[self.line.method].training
        assert training is not None
        config = fitting_config(bench.question.config, self.line, self.budget, seed)
        folders = self._classifiers(config, bench.question.folder / "classifiers" / self._classifier_name(seed))
        place = bench.question.folder / "runs" / f"{self.name}-{self.budget}-{seed}"
        return sharing(run_config(with_classifiers(config, folders), training, place, seed), bench.at_a_time)

    def _classifier_name(self, seed: int) -> str:
        """Of the classifiers: those on the same images are the same for every line (CFG fine-tuning only reports with one)."""
        kind = "prompts" if self.line.with_prompts and self.line.method != "cfg" else "pairs"
        return f"{kind}-{self.line.num_samples}-{self.budget}-{seed}"

    def _classifiers(self, config: TrainConfig, folder: Path) -> dict[str, str]:
        for control in config.controls:
            if (folder / control / SETTINGS).is_file():
                continue
            samples = None
            if config.classifier.num_pipeline_samples:
                samples = PipelineSampler(config, tuple(training_prompts(config)))
            fit_classifier(config, control, output_dir=folder / control, sample_pipeline=samples)
        return {control: str(folder / control) for control in config.controls}

    def _figures(self, folders: Mapping[str, str]) -> dict[str, Any]:
        """`calibration_metrics` of each control's classifier on the pre-trained model's images, where an oracle knows them."""
        found = {}
        for name, folder in folders.items():
            control = self.bench.config.controls[name]
            if control.oracle:
                truth = torch.from_numpy(oracle_labels(name, control, self.plain.images, self.plain.prompts).classes)
                found[name] = calibration_metrics(_beliefs(Path(folder), self.plain), truth)
        return found


@torch.no_grad()
def _beliefs(folder: Path, samples: EvaluationSamples) -> torch.Tensor:
    """log p̂(y|x), (N, K), of samples' images."""
    classifier = ImageClassifier.from_pretrained(folder)
    images = to_pixels(samples.images)
    parts = [
        classifier(images[start : start + 128], samples.prompts[start : start + 128])
        for start in range(0, len(images), 128)
    ]
    return torch.cat(parts)
