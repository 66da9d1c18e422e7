"""Aim itself: a run's record in a repository of files, and a sweep's on a tracking server on loopback."""

from __future__ import annotations

import functools
import json
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from ctrl_ray.config.tracker import parse_tracker
from ctrl_ray.reporting.tracking import METRICS_FILE, RunTracker
from ctrl_ray.tuning.results.tracking import SweepTracker
from ctrl_ray.tuning.results.trials import SweepTrial

READ = """
import aim, json, sys
found = {}
for run in aim.Repo.from_path(sys.argv[1]).iter_runs():
    [kl] = [metric for metric in run.metrics() if metric.name == "kl"]
    found[run.name] = [run.experiment, run["knobs", "kl_coef"], kl.data.items_list()[0], kl.values.values_list()]
print(json.dumps(found))
"""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    limit = time.monotonic() + 60
    while time.monotonic() < limit:
        assert server.poll() is None, "the tracking server ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the tracking server did not answer")


def test_aim_round_trip_and_resume_without_network_or_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*address: object) -> None:
        raise AssertionError(f"Aim asked for a connection: {address}")

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    run, picture = tmp_path / "run", np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    tracked = functools.partial(RunTracker, run, run_name="test", config={"seed": 3}, tracker="aim")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with tracked() as tracker:
            for update in (1, 2, 3):
                tracker.log("update", update, {"reward": float(update)})
            tracker.log("evaluation", 3, {"accuracy/jpeg_size": 0.75})
            tracker.log_images(3, "samples", [picture], ["class 0"])
        with tracked(resume_from_update=2) as tracker:
            tracker.log("update", 3, {"reward": 30.0})
    assert not [warning for warning in caught if "Aim could not" in str(warning.message)]
    assert list(home.iterdir()) == []

    import aim
    from aim.storage.context import Context

    repo = aim.Repo.from_path(str(run / "aim"))
    [run_hash] = repo.list_all_runs()  # the resumed run is the same run
    stored = repo.get_run(run_hash)
    assert stored.name == "test"
    assert stored["config"]["seed"] == 3
    rewards = stored.get_metric("reward", Context({"kind": "update"}))
    assert sorted(rewards.values.values_list()) == [1.0, 2.0, 30.0]
    accuracy = stored.get_metric("accuracy", Context({"kind": "evaluation", "control": "jpeg_size"}))
    assert accuracy.values.values_list() == [0.75]
    [[image]] = stored.get_image_sequence("samples", Context({})).values.values_list()
    assert image.caption == "class 0"
    assert np.array_equal(np.asarray(image.to_pil_image()), picture)


@pytest.mark.full
def test_a_tracking_server_gets_a_run_for_each_trial(tmp_path: Path) -> None:
    repo, own, port = tmp_path / "repo", tmp_path / "sweep", _free_port()
    repo.mkdir()
    aim = [str(Path(sys.executable).with_name("aim"))]
    subprocess.run([*aim, "init", "--repo", str(repo), "-y"], check=True, capture_output=True, timeout=120)
    command = [*aim, "server", "--repo", str(repo), "--host", "127.0.0.1", "--port", str(port), "-y"]
    with (tmp_path / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_for(port, server)
        tracker = SweepTracker(
            parse_tracker(f"aim://127.0.0.1:{port}"), own, experiment="mine", config={"seed": 1}, resume=False
        )
        trials = []
        for name, value in (("00000", 0.5), ("00001", 2.0)):
            folder = tmp_path / name
            folder.mkdir()
            rows = [{"kind": "update", "update": step, "time": 0.0, "kl": step * value} for step in (1, 2)]
            (folder / METRICS_FILE).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
            trials.append(
                SweepTrial(
                    name=name,
                    knobs={"kl_coef": value},
                    status="finished",
                    guidance_strength=1.0,
                    kl_coef=value,
                    folder=folder,
                )
            )
        tracker.follow(trials)
        tracker.close()
    finally:
        server.terminate()
        server.wait(timeout=60)
    answer = subprocess.run([sys.executable, "-c", READ, str(repo)], capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout.splitlines()[-1]) == {
        "00000": ["mine", 0.5, [1, 2], [0.5, 1.0]],
        "00001": ["mine", 2.0, [1, 2], [2.0, 4.0]],
    }
