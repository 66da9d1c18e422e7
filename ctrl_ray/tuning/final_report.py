"""After the trials: the best one's adapter, the cheap dial, and the sweep's report."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrl_ray.distributed.sampling import sample_policy
from ctrl_ray.driver.pre_trained import PreTrained, reference_job, sample_pre_trained
from ctrl_ray.driver.stages import Scorer
from ctrl_ray.evaluation.fidelity import Judges, judges_of
from ctrl_ray.evaluation.judging import judge
from ctrl_ray.evaluation.samples import EvaluationSamples, load_samples, save_samples
from ctrl_ray.planning.preflight import CheckedRun
from ctrl_ray.reporting.summary import Evaluation
from ctrl_ray.runs.files import whole_file
from ctrl_ray.runs.folder import ADAPTER, RunFolder
from ctrl_ray.tuning.results.findings import SweepFindings
from ctrl_ray.tuning.results.trials import SweepTrial, best_trial, finished_trials
from ctrl_ray.tuning.space import Space
from ctrl_ray.tuning.sweep_folder import SweepFolder
from ctrl_ray.tuning.trial import BEFORE_FILE, SAMPLES_FILE

DIAL_SCALES = (0.2, 0.4, 0.6, 0.8)
DIAL_FILE = "dial.json"


def sample_before(checked: CheckedRun, folder: SweepFolder, rewards: Scorer) -> None:
    """Samples of the pre-trained model, once for all trials; kept in the sweep's folder."""
    file = folder.path / BEFORE_FILE
    if not file.is_file():
        samples = sample_policy(reference_job(checked), rewards, checked.config.scaling)
        with whole_file(file) as draft:
            save_samples(samples, draft)
    sample_pre_trained(checked, RunFolder(str(folder.path)), rewards, PreTrained(load_samples(file)))


def conclude(
    space: Space,
    checked: CheckedRun,
    folder: SweepFolder,
    rewards: Scorer,
    trials: Sequence[SweepTrial],
    facts: Mapping[str, str],
) -> SweepFindings:
    """Choose the best finished trial, export its adapter, judge what the report shows, turn the cheap dial."""
    evaluations = _Evaluations(checked)
    before = evaluations.judged(load_samples(folder.path / BEFORE_FILE), reference=True)
    best = best_trial(trials, space.metric[0], space.mode[0])
    findings = SweepFindings(
        name=folder.name,
        trials=trials,
        knobs=list(space.knobs),
        metric=space.metric[0],
        mode=space.mode[0],
        controls=checked.config.controls,
        before=before,
        best=best,
        facts=facts,
    )
    if best is None or best.folder is None:
        return findings
    shutil.rmtree(folder.path / ADAPTER, ignore_errors=True)
    shutil.copytree(best.folder / ADAPTER, folder.path / ADAPTER)
    strongest = max(finished_trials(trials), key=lambda trial: trial.exponent, default=None)
    return dataclasses.replace(
        findings,
        adapter=str(folder.path / ADAPTER),
        shown={title: (trial, evaluations.of(trial)) for title, trial in _shown(best, trials).items()},
        dial_of=strongest,
        dial={} if strongest is None else _dial(checked, folder, rewards, strongest, evaluations),
    )


def _shown(best: SweepTrial, trials: Sequence[SweepTrial]) -> dict[str, SweepTrial]:
    """The best trial between the two extremes of the exponent, each of them once, in order of the exponent."""
    done = sorted(finished_trials(trials), key=lambda trial: trial.exponent)
    chosen = {trial.name: trial for trial in (*done[:1], best, *done[-1:])}
    return {
        f"{'best,' if name == best.name else 'exponent'}\n{'exponent ' if name == best.name else ''}{trial.exponent:.3g}": trial
        for name, trial in sorted(chosen.items(), key=lambda item: item[1].exponent)
    }


def _dial(
    checked: CheckedRun, folder: SweepFolder, rewards: Scorer, source: SweepTrial, evaluations: _Evaluations
) -> dict[float, dict[str, float]]:
    """Accuracy and KL of the strongest trial's adapter at several scales; {} where it has no LoRA to scale."""
    assert source.folder is not None
    if checked.config.full_finetune or source.metric("accuracy") is None:
        return {}
    file = folder.path / DIAL_FILE
    known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    rows: dict[str, Any] = known.get("rows", {}) if known.get("trial") == source.name else {}
    job = dataclasses.replace(
        reference_job(checked), adapter=str(source.folder / ADAPTER), reference=False, controls=checked.config.controls
    )
    for scale in DIAL_SCALES:
        if str(scale) not in rows:
            scaled = dataclasses.replace(job, adapter_scale=scale)
            judged = evaluations.judged(sample_policy(scaled, rewards, checked.config.scaling)).judged
            rows[str(scale)] = {name: judged[name] for name in ("accuracy", "kl", "prompt_fidelity")}
            file.write_text(json.dumps({"trial": source.name, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    whole = {name: source.metric(name) for name in ("accuracy", "kl", "prompt_fidelity")}
    return {**{float(scale): row for scale, row in rows.items()}, 1.0: whole}


class _Evaluations:
    """Judges samples as the trials were judged."""

    def __init__(self, checked: CheckedRun) -> None:
        self._checked = checked
        self._judges: Judges | None = None

    def of(self, trial: SweepTrial) -> Evaluation:
        """A finished trial's final evaluation, from the samples it kept."""
        assert trial.folder is not None
        return self.judged(load_samples(Path(trial.folder) / SAMPLES_FILE))

    def judged(self, samples: EvaluationSamples, *, reference: bool = False) -> Evaluation:
        """The samples with their judgement."""
        config = self._checked.config
        prompts = self._checked.evaluation_prompts
        self._judges = self._judges or judges_of(config.evaluation, prompts, samples.image_size)
        judged = judge(samples, config.controls, **self._judges._asdict(), by="oracle" if reference else "label")
        return Evaluation(judged, samples)
