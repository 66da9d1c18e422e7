"""A sweep's curves on an Aim tracking server, reached by its URL on loopback."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

from ctrl_ray.reporting.tracking import METRICS_FILE
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
        tracker = SweepTracker(f"aim://127.0.0.1:{port}", own, experiment="mine", config={"seed": 1}, resume=False)
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
