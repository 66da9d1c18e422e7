"""Connecting to Ray, and asking whether a run fits the cluster before it starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ctrl_ray.config import TrainConfig
from ctrl_ray.errors import ResourceError

_LOCAL_OBJECT_STORE_BYTES = 512 * 2**20


@contextmanager
def connected(num_cpus: int | None = None) -> Iterator[None]:
    """Use the Ray that is there (initialised, or named by RAY_ADDRESS), else start a local one and end it after.

    num_cpus: CPUs of a local Ray; None: this machine's, at least 2.
    """
    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(log_to_driver=True)
        except ConnectionError as error:
            raise ResourceError(
                f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']} ({error}); if the cluster uses token "
                "authentication, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
            ) from error
    else:
        ray.init(
            address="local",
            num_cpus=num_cpus or max(2, os.cpu_count() or 2),
            object_store_memory=_LOCAL_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=bool(os.environ.get("CTRL_RAY_VERBOSE")),
            logging_level=logging.WARNING,
        )
    try:
        yield
    finally:
        ray.shutdown()


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
        return f"{len(self.nodes)} node{'s' * (len(self.nodes) != 1)}, {cpus:g} CPUs, {gpus:g} GPUs"


def cluster_facts() -> ClusterFacts:
    """Of the connected Ray, else of the cluster that RAY_ADDRESS names (connecting for a moment), else of this machine."""
    if ray.is_initialized():
        return _ray_facts()
    if os.environ.get("RAY_ADDRESS"):
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
    nodes = []
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        resources = node["Resources"]
        gpus = float(resources.get("GPU", 0.0))
        memory = int(resources["memory"]) if "memory" in resources else None
        gpu_memory = _gpu_memory(node["NodeID"]) if gpus else None
        nodes.append(NodeFacts(float(resources.get("CPU", 0.0)), gpus, memory, gpu_memory))
    return ClusterFacts("the Ray cluster", tuple(nodes))


def _gpu_memory(node_id: str, timeout_s: float = 30.0) -> int | None:
    """Memory of a GPU of a node, asked by a task there; None where it has none that CUDA sees, or nobody answers."""

    def ask() -> int | None:
        import torch

        return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None

    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    task: Any = ray.remote(ask)
    options = {"num_cpus": 0, "num_gpus": 0.01, "max_retries": 0, "scheduling_strategy": strategy}
    reference = task.options(**options).remote()
    done, _ = ray.wait([reference], timeout=timeout_s)
    if not done:
        ray.cancel(reference, force=True)
        return None
    answer: int | None = ray.get(reference)
    return answer


def needed_resources(config: TrainConfig) -> dict[str, float]:
    """CPUs and GPUs that training workers (an elastic group: the fewest), reward pool and asynchronous evaluation reserve
    together."""
    workers, actors = config.scaling.min_workers or config.scaling.fixed_num_workers, config.rewards.num_actors
    beside = config.evaluation
    return {
        "CPU": workers * config.scaling.cpus_per_worker
        + actors * config.rewards.cpus_per_actor
        + beside.asynchronous * beside.num_cpus,
        "GPU": workers * float(config.scaling.use_gpu)
        + actors * config.rewards.gpus_per_actor
        + beside.asynchronous * beside.num_gpus,
    }


def check_resources(config: TrainConfig, available: Mapping[str, float], where: str) -> None:
    """ResourceError, with both numbers, when the run can never be placed."""
    needed = needed_resources(config)
    for kind, amount in needed.items():
        have = available.get(kind, 0.0)
        if amount > have + 1e-9:
            share = (
                f"{config.scaling.num_workers} workers × {config.scaling.cpus_per_worker:g} + "
                f"{config.rewards.num_actors} reward actors × {config.rewards.cpus_per_actor:g}"
                if kind == "CPU"
                else f"{config.scaling.num_workers} workers + {config.rewards.num_actors} reward actors × "
                f"{config.rewards.gpus_per_actor:g}"
            )
            if config.evaluation.asynchronous:
                beside = config.evaluation.num_cpus if kind == "CPU" else config.evaluation.num_gpus
                share += f" + {beside:g} for asynchronous evaluation"
            raise ResourceError(
                f"the run needs {amount:g} {kind}s ({share}), but {where} has {have:g}; lower scaling.num_workers or "
                "rewards.num_actors, or use a larger cluster"
            )


def check_local_machine(config: TrainConfig) -> None:
    """`check_resources` against the Ray that is connected, else against this machine when no cluster is named; nothing
    is started for it."""
    if ray.is_initialized():
        check_cluster(config)
        return
    if os.environ.get("RAY_ADDRESS"):
        return
    import torch

    check_resources(
        config,
        {"CPU": float(max(2, os.cpu_count() or 2)), "GPU": float(torch.cuda.device_count())},
        "this machine",
    )


def check_cluster(config: TrainConfig) -> None:
    """`check_resources` against the connected cluster."""
    check_resources(config, ray.cluster_resources(), "the Ray cluster")
