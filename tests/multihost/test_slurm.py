"""`cluster/slurm.sh` on three hosts, all of them on this machine: a real Ray, a tiny run that Slurm's signal ends and that
goes on, and a node that does not join. `srun` and `scontrol` are stand-ins; see `hosts` for the rest."""

from __future__ import annotations

import dataclasses
import re
import shlex
import signal
from pathlib import Path

import pytest

from ctrl_ray.config import RewardPoolConfig, ScalingConfig
from ctrl_ray.config.json import to_json
from tests.multihost.conftest import Say
from tests.multihost.hosts import Host, Hosts
from tests.multihost.tiny_run import RUN_VARIABLES, Command, eventually, tiny_config, updates_of

pytestmark = pytest.mark.timeout(600)

NUM_UPDATES = 6
# A task is a program that SSH runs in a process group of its own, with the environment of the job; a signal reaches the
# group, as Slurm passes it to a step. A node that has a file `down-NODE` never starts its task.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
    [[ $1 != --nodelist=* ]] || node=${1#*=}
    shift
done
[[ ! -e $STANDIN/down-$node ]] || exec sleep 300
export SLURMD_NODENAME=$node SLURM_CPUS_ON_NODE=1 SLURM_GPUS_ON_NODE=0
task=$(mktemp "$STANDIN/task.XXXXXX")
{
    export -p
    printf 'echo $$ >%q; cd %q; exec' "$task.pid" "$PWD"
    printf ' %q' "$@"
} >"$task"
over_ssh() { ssh -o BatchMode=yes -o StrictHostKeyChecking=no -o LogLevel=ERROR "$node" "$@"; }
end() {
    until [[ -s $task.pid ]] || ! kill -0 $!; do sleep 0.1; done
    over_ssh "kill -TERM -- -$(cat "$task.pid")"
}
trap end TERM
over_ssh setsid --wait bash "$task" </dev/null &
until wait $!; do
    status=$?
    kill -0 $! 2>/dev/null || exit $status
done
"""
SCONTROL = """#!/usr/bin/env bash
case $1-$2 in
    show-hostnames) tr , '\\n' <<<"$3" ;;
    show-node) echo "NodeName=$4 Arch=x86_64 NodeAddr=$4 NodeHostName=$4 State=ALLOCATED" ;;
esac
"""


class _Slurm:
    """What gives the script its nodes."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        self._first, self._folder, self.standin = next(iter(hosts.values())), folder, hosts.shared / "slurm"
        self._variables = RUN_VARIABLES
        self._number = 4711
        (self.standin / "bin").mkdir(parents=True)
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            (self.standin / "bin" / name).write_text(text)
            (self.standin / "bin" / name).chmod(0o755)

    def submit(self, *words: str | Path, nodes: list[str], **variables: str) -> Command:
        """As `sbatch --nodes=… cluster/slurm.sh WORDS` would start it on the first node."""
        self._number += 1
        path = dict(word.partition("=")[::2] for word in self._first.command("x") if word.startswith("PATH="))["PATH"]
        environment = {
            "PATH": f"{self.standin / 'bin'}:{path}",
            "PYTHONPATH": ".",
            "STANDIN": str(self.standin),
            "SLURM_JOB_ID": str(self._number),
            "SLURM_JOB_NODELIST": ",".join(nodes),
            "SLURMD_NODENAME": self._first.name,
            "RAY_worker_niceness": "0",
            "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(150 * 2**20),
            **self._variables,
            **variables,
        }
        log = self._folder / f"slurm-{self._number}.log"
        return Command(self._first, "bash", "cluster/slurm.sh", *words, log=log, env=environment)


def test_a_slurm_job_ends_at_a_signal_with_a_checkpoint_and_leaves_nothing(tmp_path: Path, say: Say) -> None:
    nodes = ["node1", "node2", "node3"]
    hosts = Hosts(tmp_path / "hosts", nodes)
    with hosts:
        say("three hosts; a Slurm job on them")
        slurm, run, file = _Slurm(hosts, tmp_path), hosts.shared / "run", hosts.shared / "config.json"
        config = dataclasses.replace(
            tiny_config(hosts.shared),
            num_updates=NUM_UPDATES,
            rewards=RewardPoolConfig(num_actors=1),
            scaling=ScalingConfig(num_workers=2),
        )
        file.write_text(to_json(config))
        job = slurm.submit("--config", file, "--output-dir", run, nodes=nodes)
        job.until(lambda: "nodes have joined" in job.said())
        assert "3 of 3 nodes have joined: 3 CPUs and 0 GPUs" in job.said()
        say("all three have joined")
        job.until(lambda: len(updates_of(run)) >= 2)
        assert [_runs(host, "raylet/raylet") for host in hosts.values()] == [1, 1, 1]
        workers = [_runs(host, "RayTrainWorker") for host in hosts.values()]
        assert sorted(workers) == [0, 1, 1]  # a CPU each, and one for the reward actor
        hosts["node1"].signal(job.process, signal.SIGUSR1)
        say("Slurm's signal")
        assert job.process.wait(timeout=60) == 130, job.said()[-6000:]
        done = len(updates_of(run))
        assert 2 <= done < NUM_UPDATES and f"stopped after update {done} of {NUM_UPDATES}; a checkpoint" in job.said()
        _check_nothing_runs(hosts)
        say("ended with a checkpoint, nothing left; a node that does not join")

        (line,) = re.findall(r"to go on: sbatch --nodes=3 cluster/slurm.sh (.*)", job.said())
        assert shlex.split(line) == ["--config", str(file), "--output-dir", str(run), "--resume"]

        (slurm.standin / "down-node2").touch()
        job = slurm.submit("--dry-run", nodes=nodes, CTRL_RAY_JOIN_TIMEOUT_S="60")
        assert job.process.wait(timeout=120) == 1, job.said()[-6000:]
        assert f"1 of 3 nodes did not join Ray at {hosts['node1'].address}:" in job.said()
        assert "within 60 s: node2." in job.said() and "Traceback" not in job.said()
        _check_nothing_runs(hosts)
        assert hosts.foreign() == []
    assert hosts.left_behind() == []
    say("nothing is left on the machine\n")


def _runs(host: Host, what: str) -> int:
    return sum(what in line for line in host.processes())


def _check_nothing_runs(hosts: Hosts) -> None:
    """No process, and no file beside the SSH keys; SSH's own processes may take a moment to go."""
    for host in hosts.values():
        left = eventually(host.processes, lambda lines: not lines, 10)
        assert not left, f"{host.name}: {left}"
        assert list((host.folder / "tmp").glob("ctrl-ray-[0-9]*")) == []
        assert not (host.folder / "home" / "ray_bootstrap_config.yaml").exists()
