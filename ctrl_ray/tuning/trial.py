"""One trial: a driver of its own that launches a Ray Train run and tells Ray Tune of its evaluations."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from ctrl_ray.config import TrainConfig
from ctrl_ray.config.json import read_train_config, to_json
from ctrl_ray.config.overrides import override
from ctrl_ray.driver.pre_trained import PRE_TRAINED_FILE, PreTrained, sample_pre_trained
from ctrl_ray.driver.stages import Scorer, evaluate_and_report, fine_tune, prepare_classifiers
from ctrl_ray.errors import ConfigError, own_error
from ctrl_ray.evaluation.certificate import certificate_row
from ctrl_ray.evaluation.judging import evaluation_row
from ctrl_ray.evaluation.samples import load_samples, save_samples
from ctrl_ray.offline.reading import OnBadRow
from ctrl_ray.planning.preflight import preflight
from ctrl_ray.reporting.tracking import METRICS_FILE
from ctrl_ray.runs.files import write_whole
from ctrl_ray.runs.folder import CONFIG_FILE, RunFolder, changed_settings
from ctrl_ray.tuning.evaluations_to_tune import EvaluationsToTune

RESULT_FILE, ERROR_FILE, SAMPLES_FILE = "result.json", "error.txt", "samples.safetensors"
SESSION_FILE = "session.json"
BEFORE_FILE = "before.safetensors"
TRIALS = "trials"
_SAMPLING_SETTINGS = ("sampler", "prompts_file", "encoding")


@dataclass(frozen=True, kw_only=True)
class TrialJob:
    """What all trials have in common."""

    base: TrainConfig
    """With fitted classifiers and absolute paths."""
    rewards: Scorer
    """The pool that all trials share, or what each worker loads for itself."""
    folder: str
    """Of the sweep; every trial is a run folder under trials/."""
    on_bad_row: OnBadRow = "error"
    """What becomes of a bad row where a trial reads the data set."""


def run_trial(knobs: dict[str, Any], job: TrialJob) -> dict[str, Any]:
    """Ray Tune's function for one trial; goes on from the trial's own checkpoints, and does nothing twice.

    Returns the result of its final evaluation. A failure is left in the trial's error.txt, in one line, and raised: it
    ends this trial alone.
    """
    folder = trial_folder(job.folder, str(tune.get_context().get_trial_id()))
    known = folder / RESULT_FILE
    if known.is_file():  # it was done when the sweep was interrupted, but Tune had not written that down
        result: dict[str, Any] = json.loads(known.read_text(encoding="utf-8"))
        return result
    folder.local.mkdir(parents=True, exist_ok=True)
    (folder / ERROR_FILE).unlink(missing_ok=True)
    try:
        result = _train(knobs, job, folder)
    except Exception as error:
        own = own_error(error) or error
        lines = str(own).strip().splitlines() or [""]
        (folder / ERROR_FILE).write_text(f"{type(own).__name__}: {lines[0]}\n", encoding="utf-8")
        raise
    write_whole(known, json.dumps(result))
    return result


def trial_name(trial_id: str) -> str:
    """What people call a trial: '00003' of Tune's 'a1b2c_00003'."""
    return trial_id.rpartition("_")[2]


def trial_folder(sweep_folder: str | Path, trial_id: str) -> RunFolder:
    """The run folder of a trial."""
    return RunFolder(str(Path(sweep_folder) / TRIALS / trial_name(trial_id)))


def trial_config(base: TrainConfig, knobs: Mapping[str, Any], folder: RunFolder) -> TrainConfig:
    """The base with the trial's settings. Its curves reach Aim through the sweep's driver, the only writer there."""
    return override(base, {**knobs, "output_dir": str(folder.local), "tracker": "none"})


def _train(knobs: Mapping[str, Any], job: TrialJob, folder: RunFolder) -> dict[str, Any]:
    started, before_s = time.monotonic(), begin_session(folder.local)
    checked = preflight(trial_config(job.base, knobs, folder))
    resume = _begun(folder, checked.asked)
    checked = prepare_classifiers(checked, folder, None)  # a copy of those of the sweep
    tells = EvaluationsToTune(checked.config.num_updates)
    own_before = any(path.split(".")[0] in _SAMPLING_SETTINGS for path in knobs)
    known = None if own_before else drawn_by_sweep(Path(job.folder))
    pre_trained = sample_pre_trained(checked, folder, job.rewards, known)
    trained = fine_tune(
        *(checked, folder, job.rewards),
        resume=resume,
        pre_trained=pre_trained,
        callbacks=[tells],
        on_bad_row=job.on_bad_row,
    )
    tells.wait_until_taken()
    final = evaluate_and_report(checked, folder, job.rewards, trained, {"sweep": job.folder}, pre_trained=pre_trained)
    save_samples(final.samples, folder / SAMPLES_FILE)
    result = {"updates_done": trained.updates_done, "stopped": trained.stopped.text if trained.stopped else ""}
    return {**numbers_of(final.after), **result, "final": True, "seconds": before_s + time.monotonic() - started}


def numbers_of(after: Mapping[str, Any]) -> dict[str, float]:
    """A final evaluation as a trial's result: everything that was measured, and NAME_error, the standard error, of what the
    sweep's tables show."""
    errors = {f"{name}_error": after["standard_errors"][name] for name in ("accuracy", "kl", "prompt_fidelity")}
    errors |= {
        f"accuracy/{name}_error": control["standard_errors"]["accuracy"] for name, control in after["controls"].items()
    }
    errors["gap_error"] = after.get("gap_standard_error")
    known = {name: error for name, error in errors.items() if error is not None}
    return evaluation_row(after) | certificate_row(after) | known


def drawn_by_sweep(folder: Path) -> PreTrained:
    """Samples of the pre-trained model that a sweep has kept in its folder for all trials."""
    scored = folder / PRE_TRAINED_FILE
    return PreTrained(load_samples(folder / BEFORE_FILE), load_samples(scored) if scored.is_file() else None)


def seconds_before(folder: Path) -> float:
    """Seconds that earlier sessions of the sweep spent on the trial in this folder."""
    file = folder / SESSION_FILE
    return float(json.loads(file.read_text(encoding="utf-8"))["seconds_before"]) if file.is_file() else 0.0


def begin_session(folder: Path) -> float:
    """Write down that a session begins; returns `seconds_before`. A killed one counts until the last row that it logged."""
    file, metrics, before = folder / SESSION_FILE, folder / METRICS_FILE, 0.0
    if file.is_file():
        last = json.loads(file.read_text(encoding="utf-8"))
        end = metrics.stat().st_mtime if metrics.is_file() else 0.0
        before = last["seconds_before"] + max(0.0, end - last["started"])
    write_whole(file, json.dumps({"started": time.time(), "seconds_before": before}))
    return before


def _begun(folder: RunFolder, asked: TrainConfig) -> bool:
    """Whether this trial was begun before, with the same settings; else its config.json is written now."""
    stored = folder / CONFIG_FILE
    if not stored.is_file():
        write_whole(stored, to_json(asked) + "\n")
        return False
    old = read_train_config(stored)
    if changed := changed_settings(old, asked):
        raise ConfigError(
            f"trial folder {folder.local} holds a run with other settings ({'; '.join(changed)}); remove it and resume the "
            "sweep again"
        )
    return True
