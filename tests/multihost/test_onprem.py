"""`cluster/onprem.yaml` on four hosts and a laptop, all of them on this machine: up over SSH, a job that loses a host in
the middle, down, nothing left. See `hosts` for how they are made."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file

from ctrl_ray.config import TrainConfig
from ctrl_ray.config.json import to_json
from tests.multihost.conftest import Say
from tests.multihost.hosts import REPOSITORY, Hosts
from tests.multihost.tiny_run import NUM_UPDATES, RUN_VARIABLES, Command, eventually, tiny_config, updates_of

pytestmark = pytest.mark.timeout(900)

DASHBOARD = "http://127.0.0.1:8265"
LAPTOP_ENV = {"RAY_AUTH_MODE": "token", "RAY_UP_enable_autoscaler_v2": "0", "RAY_USAGE_STATS_ENABLED": "0"}
COUNT_NODES = f"""\
import json, pathlib, urllib.request
token = (pathlib.Path.home() / ".ray" / "auth_token").read_text().strip()
request = urllib.request.Request("{DASHBOARD}/api/v0/nodes", headers={{"Authorization": "Bearer " + token}})
with urllib.request.urlopen(request, timeout=10) as answer:
    rows = json.load(answer)["data"]["result"]["result"]
print(sum(row["state"] == "ALIVE" for row in rows))
"""
SEND_ABROAD = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'hello', ('192.0.2.99', 9))"


def test_an_attempt_to_leave_the_network_is_noticed(tmp_path: Path) -> None:
    """A packet to a foreign address and a question for a foreign name, from a throw-away host; and no local traffic."""
    hosts = Hosts(tmp_path / "hosts", ["stranger", "neighbour"])
    with hosts:
        stranger = hosts["stranger"]
        reach = f"import socket; socket.create_connection(('{hosts['neighbour'].address}', 22), 5).close()"
        assert stranger.run("python", "-c", reach).returncode == 0
        assert stranger.run("getent", "hosts", hosts["neighbour"].address).stdout.split()[1] == "neighbour"
        assert hosts.foreign() == []
        assert stranger.run("python", "-c", SEND_ABROAD).returncode == 0
        assert stranger.run("getent", "hosts", "example.org").returncode != 0
        first, *asked = eventually(hosts.foreign, lambda attempts: len(attempts) >= 2, 5)
        assert (first["kind"], first["source"]) == ("udp", stranger.address)
        assert (first["target"], first["port"]) == ("192.0.2.99", 9)
        assert asked and all((one["port"], "example.org" in one["text"]) == (53, True) for one in asked)
        refused = stranger.run("touch", "/var/outside", "/etc/outside", REPOSITORY / "outside").stdout
        assert refused.count("Read-only file system") == 3, refused
    assert hosts.left_behind() == []


def test_a_job_on_several_machines_outlives_one_of_them(tmp_path: Path, say: Say) -> None:
    """Two training hosts, a pool host, a head that drives: one training host is cut off, the job does all its updates."""
    hosts = Hosts(tmp_path / "hosts", ["laptop", "head", "train1", "train2", "pool"])
    with hosts:
        say("five hosts; ray up")
        laptop, run = _Laptop(hosts, tmp_path), hosts.shared / "run"
        with laptop.cluster(say):
            say("all four have joined; ray job submit")
            job = laptop.submit(tiny_config(hosts.shared), run)
            job.until(lambda: (run / "classifier" / "jpeg_size" / "classifier.json").is_file())
            say("the classifier is fitted")
            job.until(lambda: len(updates_of(run)) >= 3)
            _check_places(hosts)
            hosts.cut_off("train2")
            done = len(updates_of(run))
            say(f"train2 is cut off after update {done}")
            job.until(lambda: len(updates_of(run)) > done + 1)
            say("the job goes on")
            assert job.process.wait(timeout=300) == 0, job.said()[-6000:]
            say("the job is done; ray down")
        _check_run(run, done, job)
        for host in hosts.values():
            left = eventually(host.processes, lambda lines: not lines, 90)
            assert not left, f"{host.name}: {left}"
            say(f"no process is left on {host.name}")
        assert hosts.foreign() == []
        assert laptop.host.run("python", "-c", SEND_ABROAD).returncode == 0
        (attempt,) = eventually(hosts.foreign, bool, 5)  # so it would have been noticed
        assert attempt["target"] == "192.0.2.99"
    assert hosts.left_behind() == []
    say("nothing is left on the machine\n")


class _Laptop:
    """Where the commands in the head of onprem.yaml are typed."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self.host, self._shared, self._folder = hosts["laptop"], hosts.shared, folder
        self._file = str(hosts.shared / "onprem.yaml")
        Path(self._file).write_text(_filled_in(hosts))

    @contextmanager
    def cluster(self, say: Say) -> Iterator[None]:
        """`ray up` and wait until all hosts have joined; in the end `ray down`."""
        self._ray("get-auth-token", "--generate")
        self._ray("up", "--yes", "--no-config-cache", self._file)
        say("the head is up")
        tunnel = self.host.start("ray", "dashboard", self._file, log=self._folder / "tunnel.log", env=LAPTOP_ENV)
        try:
            count = eventually(
                lambda: self.host.run("python", "-c", COUNT_NODES).stdout.strip(), lambda n: n == "4", 180
            )
            assert count == "4", count
            yield
        finally:
            self.host.interrupt(tunnel)
            self._ray("down", "--yes", self._file)
            say("the head is down")

    def submit(self, config: TrainConfig, run: Path) -> Command:
        """The main job, with this repository as its working directory."""
        file = self._shared / "config.json"
        file.write_text(to_json(config))
        environment = json.dumps({"env_vars": RUN_VARIABLES})
        submit = ["ray", "job", "submit", "--address", DASHBOARD, "--working-dir", ".", "--runtime-env-json"]
        train = ["python", "-m", "ctrl_ray.train", "--config", file, "--output-dir", run]
        return Command(self.host, *submit, environment, "--", *train, log=self._folder / "job.log", env=LAPTOP_ENV)

    def _ray(self, *words: str) -> None:
        done = self.host.run("ray", *words, env=LAPTOP_ENV, timeout_s=300)
        assert done.returncode == 0, f"ray {' '.join(words)}:\n{done.stdout[-6000:]}"


def _filled_in(hosts: Hosts) -> str:
    """The file with this test's addresses and environment. Each worker has one CPU, so that each gets one process."""
    text = (REPOSITORY / "cluster" / "onprem.yaml").read_text()
    for old, new in (
        ("REPLACE-ME-head", hosts["head"].address),
        ("REPLACE-ME-worker-1", hosts["train1"].address),
        ("REPLACE-ME-worker-2", hosts["train2"].address),
        ("REPLACE-ME-worker-3", hosts["pool"].address),
        ("REPLACE-ME-user", "root"),
        ("REPLACE-ME-pool*) offers='", "pool*) offers='--num-cpus=1 "),
        ("*) offers=''", "*) offers='--num-cpus=1'"),
        ("  - python3 -m venv ~/venv\n  - ~/venv/bin/python -m pip install --quiet ~/ctrl_ray\n", ""),
        ("  # - ln -sfn /REPLACE-ME/venv ~/venv", f"  - ln -sfn {sys.prefix} ~/venv"),
    ):
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def _check_places(hosts: Hosts) -> None:
    def runs(name: str, what: str) -> bool:
        return any(what in line for line in hosts[name].processes())

    assert runs("head", "ctrl_ray.train") and runs("head", "RewardDispatcher")
    assert runs("train1", "RayTrainWorker") and runs("train2", "RayTrainWorker")
    assert runs("pool", "RewardActor") and not runs("pool", "RayTrainWorker")


def _check_run(run: Path, cut_off_after: int, job: Command) -> None:
    """It went on from the checkpoint of the last update or of the one before, and did the rest."""
    resumed = [int(update) for update in re.findall(r"resumed after update (\d+)", job.said())]
    assert resumed and all(cut_off_after - 2 <= update <= cut_off_after + 1 for update in resumed), resumed
    assert resumed[-1] < NUM_UPDATES
    assert updates_of(run) == list(range(1, NUM_UPDATES + 1))
    assert (run / "report" / "report.html").is_file()
    assert (run / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    embeddings = load_file(run / "adapter" / "control_embeddings.safetensors")["jpeg_size"]
    assert embeddings.isfinite().all() and embeddings.abs().max() > 0
