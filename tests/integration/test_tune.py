"""A sweep on the tiny pipeline: early stopping, a failing trial, a kill in the middle, and going on from there."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from ray.util import placement_group_table

import ctrl_ray
from ctrl_ray.config import EvaluationConfig, TrainConfig
from ctrl_ray.config.json import to_json
from ctrl_ray.reporting.tracking import read_metrics
from ctrl_ray.tuning.trial import seconds_before
from tests.clusters import ROOT
from tests.registered import registered_updates

pytestmark = pytest.mark.slow

STRENGTH = "controls.jpeg_size.guidance_strength"
SWEEP_FILE = f'''
from ray import tune
from ray.tune.schedulers import ASHAScheduler

PRESET, METRIC, MODE = "base.json", "kl", "max"

def space():
    return {{
        "{STRENGTH}": tune.uniform(0.5, 3.0),
        "optimizer.embedding_learning_rate": tune.loguniform(1e-6, 1.0),
        "init_adapter": tune.choice([None, "/no/such/adapter"]),
    }}

def points():
    rows = [(2.0, 0.1, None), (2.0, 0.1, "/no/such/adapter"), (1.0, 1e-5, None), (2.0, 0.1, None)]
    return [dict(zip(space(), row)) for row in rows]

def scheduler():  # sees the evaluation after two updates; of two trials the one with less KL is stopped
    return ASHAScheduler(time_attr="updates_done", grace_period=2, max_t=5, reduction_factor=2)
'''


@pytest.fixture
def sweep_file(base_config: TrainConfig, tmp_path: Path) -> Path:
    """A user's own sweep file, beside the config.json that its trials start from."""
    config = dataclasses.replace(
        base_config,
        num_updates=4,
        micro_batch_size_per_worker=8,
        checkpoint_every_updates=1,
        evaluation=EvaluationConfig(
            every_updates=2,
            num_samples=8,
            final_num_samples=16,
            log_z_samples=16,
            max_log_z_samples=16,
            num_pairs=0,
            batch_size=16,
        ),
        tracker="aim",
    )
    (tmp_path / "base.json").write_text(to_json(config))
    (tmp_path / "mine.py").write_text(SWEEP_FILE)
    return tmp_path / "mine.py"


def _wait(condition: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 600.0) -> None:
    limit = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None and time.monotonic() < limit, "the sweep ended before it could be killed"
        time.sleep(0.1)


def _updates(trial: Path) -> list[tuple[int, float]]:
    return [(row["update"], row["time"]) for row in read_metrics(trial) if row["kind"] == "update"]


@pytest.mark.timeout(1200)  # minutes, and several times as many on a busy machine
def test_a_sweep_killed_in_the_middle_goes_on(ray_session: None, sweep_file: Path, tmp_path: Path) -> None:
    folder, trials = tmp_path / "sweep", tmp_path / "sweep" / "trials"
    command = [sys.executable, "-m", "ctrl_ray.tune", str(sweep_file)]
    groups = set(placement_group_table())
    first = subprocess.Popen(
        [*command, "--num-samples", "4", "--max-concurrent", "1", "--output-dir", str(folder)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
    )
    try:
        _wait(lambda: len(registered_updates(trials / "00003")) >= 2, first)
    finally:
        first.send_signal(signal.SIGKILL)
        output, _ = first.communicate()
        print(output)  # pytest shows it when the test fails
    rows = {line.split()[0]: line for line in output.splitlines() if line.startswith("0000")}
    assert "failed: ModelError: adapter folder /no/such/adapter does not exist; expected" in rows["00001"]
    assert rows["00000"].endswith("finished") and rows["00002"].endswith("stopped early")
    finished = (trials / "00000" / "result.json").stat().st_mtime_ns
    before = _updates(trials / "00003")

    result = ctrl_ray.sweep(sweep_file, output_dir=str(folder), resume=True, max_concurrent=1)

    assert {trial.name: trial.status for trial in result.trials} == {
        "00000": "finished",
        "00001": "failed",
        "00002": "stopped early",
        "00003": "finished",
    }
    assert (trials / "00000" / "result.json").stat().st_mtime_ns == finished  # not run again
    after = _updates(trials / "00003")
    assert [update for update, _ in after] == [1, 2, 3, 4]
    assert after[0] == before[0]  # went on from a checkpoint
    [resumed] = [trial for trial in result.trials if trial.name == "00003"]
    assert resumed.seconds > seconds_before(trials / "00003") > 0
    whole, parts = (json.loads((trials / name / "result.json").read_text()) for name in ("00000", "00003"))
    assert (whole["kl"], whole["accuracy"]) == (parts["kl"], parts["accuracy"])  # equal knobs, one of them killed
    alive = [key for key, group in placement_group_table().items() if group["state"] != "REMOVED" and key not in groups]
    assert alive == []
    _check_what_is_left(result)


def _check_what_is_left(result: ctrl_ray.SweepResult) -> None:
    assert result.best is not None and result.best.name in ("00000", "00003")
    assert result.adapter is not None and (result.adapter / "adapter.json").is_file()
    page = result.report.read_text()
    assert "/no/such/adapter" in page and str(result.adapter) in page and "--adapter-scale 0.6" in page
    results = json.loads((result.folder / "results.json").read_text())
    [pair] = results["equal_exponents"]
    assert (pair["exponent"], pair["trials"], pair["agree"]) == (2.0, ["00000", "00003"], True)
    dial = {row["scale"]: row["kl"] for row in results["dial"]["scales"]}
    assert 0 < dial[0.2] < dial[0.4] < dial[0.6] < dial[0.8] < dial[1.0] == results["trials"][0]["kl"]
    _check_aim(result)


def _check_aim(result: ctrl_ray.SweepResult) -> None:
    """One run for each trial that began, found by its knobs, with every update once; read in a process of its own."""
    script = (
        "import aim, json, sys\n"
        "repo = aim.Repo.from_path(sys.argv[1])\n"
        "found = [run.run for run in repo.query_runs('run.knobs.guidance_strength == 2', report_mode=0).iter_runs()]\n"
        "names = {run.name: run.experiment for run in found}\n"
        "[kl] = [m for run in found if run.name == '00003' for m in run.metrics()\n"
        "        if m.name == 'kl' and m.context.to_dict() == {'kind': 'update'}]\n"
        "named = {run.name: run.collect_sequence_info('images')['images'] for run in repo.iter_runs()}\n"
        "pictures = {name: sorted(images['name'] for images in logged) for name, logged in named.items()}\n"
        "print(json.dumps([names, kl.data.items_list()[0], pictures]))\n"
    )
    command = [sys.executable, "-c", script, str(result.folder / "aim")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    names, steps, pictures = json.loads(answer.stdout.splitlines()[-1])
    assert names == {"00000": "sweep", "00003": "sweep"} and steps == [1, 2, 3, 4]
    assert "samples_jpeg_size" in pictures["00000"] and pictures["00000"] == pictures["00003"]
    assert set(pictures["sweep"]) == set(result.figures) and pictures["00002"] == []  # stopped: no report
