"""Whether a plan fits the machines there are, and how many workers those machines hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from ctrl_ray.cluster.resources import ClusterFacts, NodeFacts
from ctrl_ray.config import TrainConfig
from ctrl_ray.errors import ResourceError
from ctrl_ray.planning.plan import RunPlan
from ctrl_ray.wording import size_text

PROCESS_BYTES = 700 * 2**20
"""Resident memory of a process that has imported torch, diffusers, DeepSpeed and Ray, before any tensor of ours."""
GPU_CONTEXT_BYTES = 700 * 2**20
"""CUDA context and library workspaces of a process."""
USABLE = 0.9
"""Share of a memory that a plan may fill; the rest is fragmentation and what the count does not see."""

Planner = Callable[[TrainConfig], RunPlan]
"""The plan of a config whose number of workers is decided."""


@dataclass(frozen=True)
class MemoryFit:
    """Whether a plan fits."""

    answer: Literal["yes", "no", "unknown"]
    reason: str
    """The numbers, for people."""


@dataclass(frozen=True)
class ResolvedWorkers:
    """What `scaling.num_workers` came to."""

    config: TrainConfig
    """With an integer number of workers; micro_batch_size_per_worker may be lower than asked."""
    why: str
    """For people; '' where nothing was decided."""


def memory_fit(plan: RunPlan, config: TrainConfig, facts: ClusterFacts | None) -> MemoryFit:
    """Compare a worker's peak with a GPU's memory, or the processes of a node with its RAM."""
    if facts is None:
        return MemoryFit("unknown", "no cluster is connected")
    if config.scaling.use_gpu:
        needed = plan.memory.peak + GPU_CONTEXT_BYTES
        sizes = [node.gpu_memory_bytes for node in facts.nodes if node.gpus >= 1]
        if not sizes or None in sizes:
            return MemoryFit(
                "unknown", f"a worker needs {size_text(needed)}, but {facts.where} does not say what its GPUs have"
            )
        have = min(size for size in sizes if size is not None)
        return _compare(needed, have, "a worker", f"the smallest GPU of {facts.where}")
    needed, have, who = 0, 0, ""
    for node in facts.nodes:
        for workers, actors in _on_node(node, config):
            if node.memory_bytes is None:
                return MemoryFit("unknown", f"{facts.where} does not say what memory it has")
            wanted = workers * (plan.memory.peak + PROCESS_BYTES) + actors * (plan.actor_bytes + PROCESS_BYTES)
            if not have or wanted / node.memory_bytes > needed / have:
                needed, have = wanted, node.memory_bytes
                who = f"{_count(workers, 'worker')} and {_count(actors, 'reward actor')} on one node"
    if not have:
        return MemoryFit("unknown", f"no node of {facts.where} has room for a worker")
    return _compare(needed, have, who, facts.where)


def _compare(needed: int, have: int, who: str, where: str) -> MemoryFit:
    answer: Literal["yes", "no"] = "yes" if needed <= USABLE * have else "no"
    return MemoryFit(
        answer, f"{who} need {size_text(needed)} of the {size_text(have)} of {where} ({USABLE:.0%} are usable)"
    )


def remedies(config: TrainConfig, planner: Planner, facts: ClusterFacts | None) -> list[str]:
    """Single changes that lower a worker's peak, with the peak they lead to, the best first."""
    now = planner(config).memory.peak
    tried = []
    for name, changed in _changes(config):
        plan = planner(changed)
        if plan.memory.peak < now:
            fits = " (fits)" if memory_fit(plan, changed, facts).answer == "yes" else ""
            tried.append((plan.memory.peak, f"{name}: {size_text(plan.memory.peak)}{fits}"))
    return [text for _, text in sorted(tried)]


def _changes(config: TrainConfig) -> list[tuple[str, TrainConfig]]:
    scaling = config.scaling
    changes = []
    if not scaling.gradient_checkpointing:
        changes.append(
            ("scaling.gradient_checkpointing true", dataclasses.replace(scaling, gradient_checkpointing=True))
        )
    if scaling.precision in ("fp32", "tf32"):
        changes.append(("scaling.precision bf16", dataclasses.replace(scaling, precision="bf16")))
    if scaling.fixed_num_workers > 1 and scaling.zero_stage < 3:
        changes.append(("scaling.zero_stage 3", dataclasses.replace(scaling, zero_stage=3)))
    out = [(name, dataclasses.replace(config, scaling=changed)) for name, changed in changes]
    smaller = _micro_batches(config, scaling.fixed_num_workers, config.micro_batch_size_per_worker - 1)
    if smaller:
        size = next((m for m in smaller if m <= config.micro_batch_size_per_worker // 2), smaller[-1])
        out.append(
            (f"micro_batch_size_per_worker {size}", dataclasses.replace(config, micro_batch_size_per_worker=size))
        )
    return out


def resolve_num_workers(config: TrainConfig, facts: ClusterFacts | None, planner: Planner) -> ResolvedWorkers:
    """Decide `scaling.num_workers` where it is 'auto'; the only place that does.

    As many workers as the cluster places beside the reward pool and as divide global_batch_size; then the largest
    micro-batch up to the one asked for that divides each one's share and fits its memory (or the one asked for, where
    that is unknown or none fits). Raises ResourceError where not even one worker has room.
    """
    if config.scaling.num_workers != "auto":
        return ResolvedWorkers(config, "")
    if facts is None:
        raise ResourceError(
            "scaling.num_workers is auto, but no cluster can be asked what it has; give a number, or connect to a cluster"
        )
    room = place_workers(config, facts.nodes)
    if room < 1:
        raise ResourceError(
            f"scaling.num_workers is auto, but {facts.where} ({facts.described}) has no room for a worker of "
            f"{_per_worker(config)} beside {config.rewards.num_actors} reward actors; lower rewards.num_actors, "
            "scaling.cpus_per_worker, or use a larger cluster"
        )
    workers = max(n for n in range(1, room + 1) if _micro_batches(config, n, config.micro_batch_size_per_worker))
    why = f"auto: {facts.where} ({facts.described}) has room for {room} of {_per_worker(config)} beside the reward pool"
    if workers < room:
        why += f"; {workers} is the most that divides global_batch_size ({config.global_batch_size})"
    sizes = _micro_batches(config, workers, config.micro_batch_size_per_worker)
    candidates = [
        dataclasses.replace(
            config,
            micro_batch_size_per_worker=size,
            scaling=dataclasses.replace(config.scaling, num_workers=workers),
        )
        for size in sizes
    ]
    chosen = next((c for c in candidates if memory_fit(planner(c), c, facts).answer != "no"), candidates[0])
    asked, got = config.micro_batch_size_per_worker, chosen.micro_batch_size_per_worker
    if got < sizes[0]:
        why += f"; micro_batch_size_per_worker is lowered from {asked} to {got}, the largest that fits its memory"
    elif got < asked:
        why += (
            f"; micro_batch_size_per_worker is lowered from {asked} to {got}, to divide a worker's share of the batch"
        )
    return ResolvedWorkers(chosen, why)


def place_workers(config: TrainConfig, nodes: Sequence[NodeFacts]) -> int:
    """How many workers the nodes hold beside the reward actors, which take the first room they find."""
    free = [[node.cpus, node.gpus] for node in nodes]
    for _ in range(config.rewards.num_actors):
        _take_actor(config, free)
    return sum(_room(config, cpus, gpus) for cpus, gpus in free)


def _take_actor(config: TrainConfig, free: list[list[float]]) -> bool:
    rewards = config.rewards
    for node in free:
        if node[0] + 1e-9 >= rewards.cpus_per_actor and node[1] + 1e-9 >= rewards.gpus_per_actor:
            node[0] -= rewards.cpus_per_actor
            node[1] -= rewards.gpus_per_actor
            return True
    return False


def _room(config: TrainConfig, cpus: float, gpus: float) -> int:
    by_cpu = math.floor(cpus / config.scaling.cpus_per_worker + 1e-9)
    return max(0, min(by_cpu, math.floor(gpus + 1e-9)) if config.scaling.use_gpu else by_cpu)


def _on_node(node: NodeFacts, config: TrainConfig) -> list[tuple[int, int]]:
    """Every (workers, actors) that may share a node: any number of actors that it holds, and workers in the rest."""
    free, found = [[node.cpus, node.gpus]], []
    for actors in range(config.rewards.num_actors + 1):
        if actors and not _take_actor(config, free):
            break
        workers = min(config.scaling.fixed_num_workers, _room(config, *free[0]))
        if workers + actors:
            found.append((workers, actors))
    return found


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _micro_batches(config: TrainConfig, workers: int, largest: int) -> list[int]:
    """Micro-batch sizes up to `largest` that divide a worker's share of the global batch, largest first."""
    if config.global_batch_size % workers:
        return []
    share, group = config.global_batch_size // workers, config.group_size
    return [size for size in range(min(largest, share), 0, -1) if share % size == 0 and size % group == 0]


def _per_worker(config: TrainConfig) -> str:
    return "one GPU" if config.scaling.use_gpu else f"{config.scaling.cpus_per_worker:g} CPUs"
