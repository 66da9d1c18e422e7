"""A run on two nodes of which one is lost and comes back: `python -m tests.integration.elastic CONFIG FOLDER`."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.cluster_utils import Cluster

from ctrl_ray.config_json import train_config_from_json
from ctrl_ray.distributed.batches import num_rounds
from ctrl_ray.distributed.checkpoints import read_checkpoint
from ctrl_ray.distributed.launch import new_channel, run_training
from ctrl_ray.distributed.preflight import preflight
from ctrl_ray.distributed.run import rewards_of
from ctrl_ray.distributed.worker import TrainJob
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.model import RewardModelSpec, load_reward_model

LOST_AT, BACK_AT = 3, 5
"""The group of two waits in this update (from 0) for the node's loss, the group of one in that for its return."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """Rewards that write down which samples they saw, and hold a group up until the cluster has changed."""

    spec: RewardModelSpec
    folder: Path
    batch_size: int
    micro_batch_size: int

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
        if (update, self._size, self._first) == (LOST_AT, 2, 0) or (update, self._size) == (BACK_AT, 1):
            (self._plan.folder / f"waiting{self._size}").touch()
            deadline = time.monotonic() + 200
            while time.monotonic() < deadline:  # Ray Train ends this group
                time.sleep(0.1)
            raise TimeoutError(f"a group of {self._size} was not changed in update {update}")
        return super().submit(latents, prompts, labels, weights)


def main(file: str, folder: Path) -> None:
    """`folder`/rows.json is what the workers told."""
    config = train_config_from_json(Path(file).read_text())
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 * 2**20},
    )
    node = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False)
    rows: list[Mapping[str, Any]] = []
    changes = {"waiting2": lambda: cluster.remove_node(node, allow_graceful=False)}
    changes["waiting1"] = lambda: cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    plan = preflight(config)
    with rewards_of(config) as spec:
        assert isinstance(spec, RewardModelSpec)
        rewards: Any = Recording(spec, folder, config.global_batch_size, config.micro_batch_size_per_worker)
        job = TrainJob(
            config=plan.config,
            controls=plan.controls,
            prompts=plan.prompts,
            rewards=rewards,
            info=plan.info,
            channel=_Watched(new_channel(), folder, changes),
        )
        run_training(job, str(folder), rows.append)
    (folder / "rows.json").write_text(json.dumps(rows))
    ray.shutdown()
    cluster.shutdown()


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
    main(sys.argv[1], Path(sys.argv[2]))
