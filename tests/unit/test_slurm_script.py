"""cluster/slurm.sh, run as it is on this machine's loopback: what it needs, what it starts, what it passes on, what it leaves.

Stand-ins on PATH: `srun` runs its command here, `scontrol` takes a comma-separated list for a list of nodes, `ray` opens the
head's port and waits, and `python` plays the program that counts nodes and the training. tests/multihost/test_slurm.py has
real Ray on several hosts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster" / "slurm.sh"

SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
    [[ $1 != --nodelist=* ]] || node=${1#*=}
    shift
done
touch "$FOLDER/ray"
while (($(wc -l <"$FOLDER/ray") < ${node#node} - 1)); do sleep 0.02; done # one after the other: they share this /tmp
export SLURMD_NODENAME=$node SLURM_CPUS_ON_NODE=6 SLURM_GPUS_ON_NODE=2
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
[[ $* != "show hostnames "* ]] || tr , '\\n' <<<"$3"
"""
RAY = """#!{python}
import json, os, re, signal, socket, sys, time
line = " ".join(sys.argv)
with open(os.environ["FOLDER"] + "/ray", "a") as file:
    file.write(json.dumps([os.environ["SLURMD_NODENAME"], sys.argv[1:], dict(os.environ)]) + "\\n")
if os.environ["SLURMD_NODENAME"] == os.environ.get("BROKEN"):
    sys.exit("no room for Ray here")
if "--head" in line:
    service = socket.create_server(("127.0.0.1", int(re.search(r"--port=(\\d+)", line)[1])))
if os.fork() == 0:  # an agent that outlives `ray start`
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(60)
"""
PYTHON = """#!{python}
import json, os, signal, sys, time
if sys.argv[1] == "-c":
    sys.exit(os.environ.get("WITHOUT_CTRL_RAY", 0) and 1)
if sys.argv[1] == "-":
    while len(open(os.environ["FOLDER"] + "/ray").readlines()) < len(sys.argv) - 3:
        time.sleep(0.02)
    print(os.environ.get("MISSING", ""), "12 CPUs and 4 GPUs", sep="\\n")
    sys.exit()
def stop(*_):
    print("left one", flush=True)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
with open(os.environ["FOLDER"] + "/train", "w") as file:
    json.dump([sys.argv[1:], os.environ["RAY_ADDRESS"], sorted(os.listdir(os.environ["HOME"]))], file)
time.sleep(float(os.environ.get("LASTS", 0)))
sys.exit(int(os.environ.get("STATUS", 0)))
"""


@dataclasses.dataclass
class Job:
    """What Slurm would have given to the script."""

    folder: Path
    environment: dict[str, str]

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """The exit status, and what it said."""
        process = self.start(*arguments, **environment)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said

    @property
    def rays(self) -> list[tuple[str, list[str], dict[str, str]]]:
        """The node, the arguments and the environment of every `ray`."""
        return [tuple(json.loads(line)) for line in (self.folder / "ray").read_text().splitlines()]

    def left(self) -> list[str]:
        """Processes of this job, and its folders."""
        found = [path for path in (self.temp, *(self.folder / "home").iterdir()) if path.exists()]
        for process in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"FOLDER={self.folder}".encode() in process.read_bytes().split(b"\0"):
                    found.append(process)
            except OSError:
                continue  # ended, or another user's
        return list(map(str, found))

    @property
    def temp(self) -> Path:
        return Path(f"/tmp/ctrl-ray-{self.environment['SLURM_JOB_ID']}")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    programs = tmp_path / "bin"
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("ray", RAY), ("python", PYTHON)):
        file = programs / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text.replace("{python}", sys.executable))
        file.chmod(0o755)
    (tmp_path / "home").mkdir()
    environment = {
        "PATH": f"{programs}:/usr/bin:/bin",
        "HOME": str(tmp_path / "home"),
        "FOLDER": str(tmp_path),
        "SLURM_JOB_ID": str(10**7 + os.getpid()),
        "SLURM_JOB_NODELIST": "node1",
        "SLURMD_NODENAME": "node1",
        "CTRL_RAY_HEAD_ADDRESS": "127.0.0.1",
        "CTRL_RAY_JOIN_TIMEOUT_S": "30",
    }
    yield Job(tmp_path, environment)
    shutil.rmtree(f"/tmp/ctrl-ray-{environment['SLURM_JOB_ID']}", ignore_errors=True)


def _wait(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("without", "says"),
    [
        ({"SLURM_JOB_ID": ""}, "no Slurm job; submit it: sbatch cluster/slurm.sh"),
        ({"PATH": "/usr/bin:/bin"}, "srun is not on PATH"),
        ({"WITHOUT_CTRL_RAY": "1"}, "bin/python does not have ctrl_ray and ray; activate the environment"),
        ({"SLURMD_NODENAME": "login"}, "this runs on login, but the job's first node is node1"),
    ],
)
def test_what_is_missing_is_said_before_anything_starts(job: Job, without: dict[str, str], says: str) -> None:
    status, said = job.run("--preset", "shapes", **without)
    assert (status, said.count("\n")) == (2, 1) and says in said, said
    assert not (job.folder / "ray").exists() and job.left() == []


@pytest.mark.full
def test_one_run_on_a_ray_of_two_nodes_of_which_nothing_is_left(job: Job) -> None:
    words = ["--preset", "shapes", "--output-dir", "runs/with blank"]
    status, said = job.run(*words, SLURM_JOB_NODELIST="node1,node2", SLURM_MEM_PER_NODE="1000", STATUS="1")
    assert status == 1, said
    assert "2 of 2 nodes have joined: 12 CPUs and 4 GPUs" in said
    module, address, home = json.loads((job.folder / "train").read_text())
    port = 20_000 + int(job.environment["SLURM_JOB_ID"]) % 1200 * 10
    assert (module, address) == (["-m", "ctrl_ray.train", *words], f"127.0.0.1:{port}")
    assert home == ["ray_bootstrap_config.yaml"]  # while it ran
    assert job.left() == []
    # Whoever pastes the line goes on with the same run.
    (line,) = re.findall(r"to go on, once the cause is gone: (.*)", said)
    assert shlex.split(line) == ["sbatch", "--nodes=2", "cluster/slurm.sh", *words, "--resume"]

    (head, first, environment), (worker, second, _) = job.rays
    assert (head, worker) == ("node1", "node2")
    same = {"start", "--block", f"--temp-dir={job.temp}", "--num-cpus=6", "--num-gpus=2", f"--memory={700 * 2**20}"}
    assert same | {"--head", "--node-ip-address=127.0.0.1", f"--port={port}"} <= set(first)
    assert same | {f"--address={address}"} <= set(second) and "--head" not in second
    assert '--resources={"slurm_node_node2": 1}' in second
    ports = [int(word.partition("=")[2]) for word in first if re.match(r"--[\w-]*port=[1-9]", word)]
    assert len(set(ports)) == len(ports) and all(port <= number < port + 10 for number in ports)
    assert environment["RAY_AUTH_MODE"] == "token" and re.fullmatch(r"[0-9a-f]{64}", environment["RAY_AUTH_TOKEN"])
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.full
def test_slurms_signal_becomes_a_checkpoint_and_the_command_that_goes_on(job: Job) -> None:
    process = job.start("--resume", "--preset", "shapes", LASTS="50")
    _wait(lambda: (job.folder / "train").is_file() and (job.folder / "train").stat().st_size > 0)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert said.index("a signal has come") < said.index("left one\n") < said.index("to go on: sbatch")
    assert said.count("--resume") == 1
    assert job.left() == []


def test_a_node_without_ray_ends_the_job_with_what_it_said(job: Job) -> None:
    status, said = job.run(BROKEN="node1")
    assert status == 1 and "Ray ended on node1 before the run began:\n  node1: no room for Ray here" in said, said
    assert job.left() == []


@pytest.mark.full
def test_nodes_that_did_not_join_are_named(job: Job) -> None:
    nodes = "node1,node2,node3"
    status, said = job.run(SLURM_JOB_NODELIST=nodes, MISSING="node2 node3", CTRL_RAY_JOIN_TIMEOUT_S="7")
    assert status == 1 and "2 of 3 nodes did not join Ray at 127.0.0.1:" in said, said
    assert "within 7 s: node2 node3." in said and "sbatch --exclude=node2,node3" in said
    assert not (job.folder / "train").exists() and job.left() == []


def test_the_header_asks_for_whole_nodes_and_a_signal_in_time() -> None:
    """sbatch reads options only before the first command."""
    head = SCRIPT.read_text(encoding="utf-8").partition("\nset -uo pipefail\n")[0]
    assert all(line.startswith("#") for line in head.splitlines())
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", head, re.M))
    assert options["ntasks-per-node"] == "1" and options["gpus-per-node"] == "8"
    assert re.fullmatch(r"B:USR1@\d+", options["signal"])  # to the script alone: Ray must outlive it
    assert int(options["cpus-per-task"]) >= 8 * 4 + 8
