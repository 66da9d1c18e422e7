"""What a cluster has, and whether a run fits it before it starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ctrl_ray.cluster.autoscaler import Growth, growth
from ctrl_ray.cluster.connection import connected, names_cluster
from ctrl_ray.config import TrainConfig
from ctrl_ray.errors import ResourceError
from ctrl_ray.wording import counted


@dataclass(frozen=True)
class NodeFacts:
    """What one machine has."""

    cpus: float
    gpus: float
    memory_bytes: int | None
    """RAM that Ray may use there; None: unknown."""
    gpu_memory_bytes: int | None = None
    """Memory of its smallest GPU; None: unknown."""


@dataclass(frozen=True)
class ClusterFacts:
    """What the machines of a run have, whatever is in use now."""

    where: str
    nodes: tuple[NodeFacts, ...]

    @property
    def described(self) -> str:
        """'2 nodes, 16 CPUs, 4 GPUs'."""
        cpus, gpus = sum(node.cpus for node in self.nodes), sum(node.gpus for node in self.nodes)
        return f"{counted(len(self.nodes), 'node')}, {counted(cpus, 'CPU')}, {counted(gpus, 'GPU')}"


def cluster_facts() -> ClusterFacts:
    """Of the connected Ray, else of the cluster that RAY_ADDRESS names (connecting for a moment), else of this machine."""
    if ray.is_initialized():
        return _ray_facts()
    if names_cluster():
        with connected():
            return _ray_facts()
    import torch

    gpus = torch.cuda.device_count()
    smallest = min((torch.cuda.get_device_properties(i).total_memory for i in range(gpus)), default=None)
    node = NodeFacts(float(max(2, os.cpu_count() or 2)), float(gpus), local_memory_bytes(), smallest)
    return ClusterFacts("this machine", (node,))


def local_memory_bytes() -> int:
    """RAM of this machine, or of its container where that has a limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(file).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdecimal():
            total = min(total, int(text))
    return total


def _ray_facts() -> ClusterFacts:
    alive = [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    gpu_memory = _gpu_memory([number for number, resources in alive if resources.get("GPU", 0.0)])
    return ClusterFacts(
        "the Ray cluster",
        tuple(
            NodeFacts(
                cpus=float(resources.get("CPU", 0.0)),
                gpus=float(resources.get("GPU", 0.0)),
                memory_bytes=int(resources["memory"]) if "memory" in resources else None,
                gpu_memory_bytes=gpu_memory.get(number),
            )
            for number, resources in alive
        ),
    )


_known_gpu_memory: dict[str, int] = {}
"""What nodes have answered, by Ray's id of the node: it does not change."""


def _gpu_memory(node_ids: Sequence[str], timeout_s: float = 30.0) -> dict[str, int]:
    """Memory of a GPU of each node, asked by tasks on all of them at once; without those that have none that CUDA sees, or
    do not answer. A node is asked until it has answered once."""
    remote: Any = ray.remote(_first_gpu_memory)
    asked = {
        remote.options(
            num_cpus=0,
            num_gpus=0.01,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(number, soft=False),
        ).remote(): number
        for number in node_ids
        if number not in _known_gpu_memory
    }
    if asked:
        done, late = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
        for reference in late:
            ray.cancel(reference, force=True)
        for reference in done:
            with suppress(RayError):  # the node was lost meanwhile
                answer = ray.get(reference)
                if answer is not None:
                    _known_gpu_memory[asked[reference]] = answer
    return {number: _known_gpu_memory[number] for number in node_ids if number in _known_gpu_memory}


def _first_gpu_memory() -> int | None:
    import torch

    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def needed_resources(config: TrainConfig) -> dict[str, float]:
    """CPUs and GPUs that training workers (an elastic group: the fewest), reward pool and asynchronous evaluation reserve
    together."""
    workers, actors = config.scaling.min_workers or config.scaling.fixed_num_workers, config.rewards.num_actors
    worker, beside = config.scaling.worker_resources, config.evaluation
    return {
        "CPU": workers * worker["CPU"] + actors * config.rewards.cpus_per_actor + beside.asynchronous * beside.num_cpus,
        "GPU": workers * worker.get("GPU", 0.0)
        + actors * config.rewards.fixed_gpus_per_actor
        + beside.asynchronous * beside.num_gpus,
    }


def check_resources(
    config: TrainConfig, available: Mapping[str, float], where: str, may_grow: Growth | None = None
) -> None:
    """ResourceError, with both numbers, when the run can never be placed, whatever an autoscaler adds."""
    may_grow = may_grow or Growth()
    needed = needed_resources(config)
    scaling = config.scaling
    for kind, amount in needed.items():
        have, more = available.get(kind, 0.0), may_grow.most(kind)
        if kind == "GPU" and scaling.use_gpu and scaling.fixed_gpus_per_worker > 0.5:  # a card for each
            amount = max(amount, scaling.min_workers or scaling.fixed_num_workers)
        if amount > have + more + 1e-9:
            has = f"{where} has {have:g}" + (f", and its autoscaler may add {more:g}" if may_grow.node_types else "")
            raise ResourceError(
                f"the run needs {counted(amount, kind)} ({_shares(config, kind)}), but {has}; lower scaling.num_workers or "
                "rewards.num_actors, or use a larger cluster"
            )


def _shares(config: TrainConfig, kind: str) -> str:
    """'2 workers × 1 + 1 reward actor × 0.5', of CPUs or GPUs."""
    scaling, rewards, beside = config.scaling, config.rewards, config.evaluation
    workers, actors = counted(scaling.fixed_num_workers, "worker"), counted(rewards.num_actors, "reward actor")
    if kind == "CPU":
        share = f"{workers} × {scaling.cpus_per_worker:g} + {actors} × {rewards.cpus_per_actor:g}"
    else:
        on_cards = "" if scaling.gpus_per_worker == 1 else f" × {scaling.gpus_per_worker:g}, a card for each"
        share = f"{workers}{on_cards} + {actors} × {rewards.fixed_gpus_per_actor:g}"
    if beside.asynchronous:
        share += f" + {beside.num_cpus if kind == 'CPU' else beside.num_gpus:g} for asynchronous evaluation"
    return share


def check_local_machine(config: TrainConfig) -> None:
    """`check_resources` against the Ray that is connected, else against this machine when no cluster is named; nothing
    is started for it."""
    if ray.is_initialized():
        check_cluster(config)
        return
    if names_cluster():
        return
    import torch

    check_resources(
        config,
        {"CPU": float(max(2, os.cpu_count() or 2)), "GPU": float(torch.cuda.device_count())},
        "this machine",
    )


def check_stated(config: TrainConfig, stated: ClusterFacts) -> None:
    """`check_resources` against machines that need not be there."""
    have = {"CPU": sum(node.cpus for node in stated.nodes), "GPU": sum(node.gpus for node in stated.nodes)}
    check_resources(config, have, stated.where)


def check_cluster(config: TrainConfig) -> None:
    """`check_resources` against the connected cluster and what its autoscaler may add."""
    check_resources(config, ray.cluster_resources(), "the Ray cluster", growth())
