"""A run on two nodes of which one is lost and comes back, or is announced to be taken away:
`python -m tests.integration.elastic lost|spot CONFIG FOLDER`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from ctrl_ray.config.json import train_config_from_json
from ctrl_ray.distributed import rows as kinds
from ctrl_ray.distributed.batches import num_rounds
from ctrl_ray.distributed.checkpoints import read_checkpoint
from ctrl_ray.distributed.launch import run_training
from ctrl_ray.distributed.rows import Row
from ctrl_ray.driver.stages import rewards_of, train_job
from ctrl_ray.planning.preflight import preflight
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.model import RewardModelSpec, load_reward_model

HOLDS = {"lost": ((3, 2, ""), (5, 1, "")), "spot": ((2, 2, "drained"), (3, 2, ""))}
"""(update from 0, workers, file): in this update a group of this size waits for a change of the cluster; for the file
until it goes on, without one until Ray Train ends the group."""
DEADLINE_S = 15
"""Between a spot notice and the loss of its node."""
ROWS = "rows.json"


@dataclasses.dataclass(frozen=True)
class Recording:
    """Rewards that write down which samples they saw, and hold a group up until the cluster has changed."""

    spec: RewardModelSpec
    folder: Path
    batch_size: int
    micro_batch_size: int
    holds: tuple[tuple[int, int, str], ...]

    def for_worker(self, rank: int) -> RecordingRewards:
        """What the worker calls."""
        return RecordingRewards(self, rank)


class RecordingRewards(LocalRewards):
    """One worker's."""

    def __init__(self, plan: Recording, rank: int) -> None:
        super().__init__(load_reward_model(plan.spec))
        self._plan, self._rank, self._requests = plan, rank, 0
        self._size = ray.train.get_context().get_world_size()
        checkpoint = ray.train.get_checkpoint()
        self._first = 0
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                self._first = read_checkpoint(folder)[1]["updates_done"]

    def submit(self, latents: Any, prompts: Any, labels: Any, weights: Any) -> Any:
        """Write a line, wait where it is time to."""
        rounds = num_rounds(self._plan.batch_size, self._size, self._plan.micro_batch_size)
        update = self._first + self._requests // rounds
        self._requests += 1
        row = {"update": update, "workers": self._size, "samples": list(zip(prompts, labels.tolist(), strict=True))}
        with (self._plan.folder / "samples.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        for at, size, file_name in self._plan.holds:
            if (update, self._size) == (at, size) and (size == 1 or self._first == 0):
                self._hold(update, self._plan.folder / file_name if file_name else None)
        return super().submit(latents, prompts, labels, weights)

    def _hold(self, update: int, until: Path | None) -> None:
        (self._plan.folder / f"waiting{update}").touch()
        deadline = time.monotonic() + 200
        while until is None or not until.exists():
            if time.monotonic() > deadline:
                raise TimeoutError(f"a group of {self._size} was not changed in update {update}")
            time.sleep(0.1)


def main(scenario: str, file: str, folder: Path) -> None:
    """Leaves what the workers told in `folder`, for `read_rows`."""
    config = train_config_from_json(Path(file).read_text())
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20},
    )
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False)
    rows: list[Row] = []
    changes: dict[str, Callable[[], Any]] = {
        "waiting3": lambda: cluster.remove_node(node, allow_graceful=False),
        "waiting5": lambda: cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20),
    }
    if scenario == "spot":
        changes = {"waiting2": lambda: _announce(cluster.address, node.node_id, folder / "drained")}
    with rewards_of(config) as spec:
        assert isinstance(spec, RewardModelSpec)
        rewards: Any = Recording(
            spec, folder, config.global_batch_size, config.micro_batch_size_per_worker, HOLDS[scenario]
        )
        job = train_job(preflight(config), rewards)
        channel = _Watched(job.channel, folder, changes)
        run_training(dataclasses.replace(job, channel=channel), str(folder), "run", rows.append)
    told = [(type(row).__name__, dataclasses.asdict(row)) for row in rows]
    (folder / ROWS).write_text(json.dumps(told))
    ray.shutdown()
    cluster.shutdown()


def read_rows(folder: Path) -> list[Row]:
    """What the workers of a run told that `main` has made in `folder`."""
    return [getattr(kinds, name)(**fields) for name, fields in json.loads((folder / ROWS).read_text())]


def _announce(address: str, node_id: str, noticed: Path) -> None:
    """Drain a node as for a spot notice; the file is written when Ray Train must have seen it."""
    deadline_ms = int(1000 * (time.time() + DEADLINE_S))
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why_not = GcsClient(address=address).drain_node(node_id, reason, "spot notice", deadline_ms)
    assert accepted, why_not
    time.sleep(3)
    noticed.touch()


class _Watched:
    """The channel; whenever the driver looks into it, the cluster is changed if a group waits for that."""

    def __init__(self, channel: Any, folder: Path, changes: dict[str, Any]) -> None:
        self._channel, self._folder, self._changes = channel, folder, changes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "drain":
            for marker in [marker for marker in self._changes if (self._folder / marker).exists()]:
                self._changes.pop(marker)()
        return getattr(self._channel, name)

    def __reduce__(self) -> Any:
        return (_same, (self._channel,))


def _same(channel: Any) -> Any:
    return channel


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
