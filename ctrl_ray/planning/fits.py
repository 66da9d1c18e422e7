"""Whether a plan fits the machines there are, and which single changes make it smaller."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from ctrl_ray.cluster.resources import ClusterFacts
from ctrl_ray.config import TrainConfig
from ctrl_ray.planning.placement import actors_on_a_card, on_node, shares_cards
from ctrl_ray.planning.plan import RunPlan
from ctrl_ray.wording import counted, size_text

PROCESS_BYTES = 700 * 2**20
"""Resident memory of a process that has imported torch, diffusers, DeepSpeed and Ray, before any tensor of ours."""
GPU_CONTEXT_BYTES = 700 * 2**20
"""CUDA context and library workspaces of a process."""
USABLE = 0.9
"""Share of a memory that a plan may fill; the rest is fragmentation and what the count does not see."""

PlanOf = Callable[[TrainConfig], RunPlan]
"""The plan of a config whose values are decided."""


@dataclass(frozen=True)
class MemoryFit:
    """Whether a plan fits."""

    answer: Literal["yes", "no", "unknown"]
    reason: str
    """The numbers, for people."""


@dataclass(frozen=True)
class CardUse:
    """The processes that may come to lie on one card, and what they take together."""

    who: str
    bytes: int


def card_uses(plan: RunPlan, config: TrainConfig, facts: ClusterFacts | None) -> list[CardUse]:
    """Cards with a worker, and cards that reward actors have to themselves."""
    actors = actors_on_a_card(config, () if facts is None else facts.nodes)
    theirs = actors * (plan.actor_bytes + GPU_CONTEXT_BYTES)
    who, needed = "a worker", plan.memory.peak + GPU_CONTEXT_BYTES
    uses = []
    if actors and shares_cards(config):
        who, needed = f"{who} and {counted(actors, 'reward actor')} on one card", needed + theirs
    elif actors:
        uses.append(CardUse(f"{counted(actors, 'reward actor')} on one card", theirs))
    beside = config.evaluation
    if beside.asynchronous and 0 < beside.num_gpus <= 1 - config.scaling.fixed_gpus_per_worker + 1e-9:
        who, needed = f"{who}, with an asynchronous evaluation", needed + plan.evaluation_bytes + GPU_CONTEXT_BYTES
    return [CardUse(who, needed), *uses]


def memory_fit(plan: RunPlan, config: TrainConfig, facts: ClusterFacts | None) -> MemoryFit:
    """Compare what may lie on one GPU with its memory, or the processes of a node with its RAM."""
    if facts is None:
        return MemoryFit("unknown", "no cluster is connected")
    if config.scaling.use_gpu:
        use = max(card_uses(plan, config, facts), key=lambda use: use.bytes)
        sizes = [node.gpu_memory_bytes for node in facts.nodes if node.gpus >= 1]
        if not sizes or None in sizes:
            return MemoryFit(
                "unknown", f"{use.who}: {size_text(use.bytes)}, but {facts.where} does not say what its GPUs have"
            )
        have = min(size for size in sizes if size is not None)
        return _compare(use.bytes, have, use.who, f"the smallest GPU of {facts.where}")
    needed, have, who = 0, 0, ""
    for node in facts.nodes:
        for workers, actors in on_node(node, config):
            if node.memory_bytes is None:
                return MemoryFit("unknown", f"{facts.where} does not say what memory it has")
            wanted = workers * (plan.memory.peak + PROCESS_BYTES) + actors * (plan.actor_bytes + PROCESS_BYTES)
            if not have or wanted / node.memory_bytes > needed / have:
                needed, have = wanted, node.memory_bytes
                who = f"{counted(workers, 'worker')} and {counted(actors, 'reward actor')} on one node"
    if not have:
        return MemoryFit("unknown", f"no node of {facts.where} has room for a worker")
    return _compare(needed, have, who, facts.where)


def _compare(needed: int, have: int, who: str, where: str) -> MemoryFit:
    answer: Literal["yes", "no"] = "yes" if needed <= USABLE * have else "no"
    return MemoryFit(
        answer, f"{who}: {size_text(needed)} of the {size_text(have)} of {where} ({USABLE:.0%} are usable)"
    )


def remedies(config: TrainConfig, plan_of: PlanOf, facts: ClusterFacts | None) -> list[str]:
    """Single changes after which a card (or a worker on the CPU) needs less, with what it then needs, the best first."""

    def needed(changed: TrainConfig) -> tuple[int, RunPlan]:
        plan = plan_of(changed)
        if not config.scaling.use_gpu:
            return plan.memory.peak, plan
        return max(use.bytes for use in card_uses(plan, changed, facts)), plan

    now, _ = needed(config)
    tried = []
    for name, changed in _changes(config, facts):
        then, plan = needed(changed)
        if then < now:
            fits = " (fits)" if memory_fit(plan, changed, facts).answer == "yes" else ""
            tried.append((then, f"{name}: {size_text(then)}{fits}"))
    return [text for _, text in sorted(tried)]


def _changes(config: TrainConfig, facts: ClusterFacts | None) -> Iterator[tuple[str, TrainConfig]]:
    scaling, rewards, evaluation = config.scaling, config.rewards, config.evaluation

    def scaled(**changes: object) -> TrainConfig:
        return dataclasses.replace(config, scaling=dataclasses.replace(scaling, **changes))  # type: ignore[arg-type]

    def rewarded(**changes: object) -> TrainConfig:
        return dataclasses.replace(config, rewards=dataclasses.replace(rewards, **changes))  # type: ignore[arg-type]

    keeps_graphs = config.estimator.fixed_keep_graphs
    if keeps_graphs:  # what else lowers the activations does not go with it
        yield (
            "estimator.keep_graphs false",
            dataclasses.replace(config, estimator=dataclasses.replace(config.estimator, keep_graphs=False)),
        )
    elif not scaling.fixed_gradient_checkpointing:
        yield "scaling.gradient_checkpointing true", scaled(gradient_checkpointing=True)
    if scaling.precision not in ("bf16", "fp16"):
        yield "scaling.precision bf16", scaled(precision="bf16")
    if scaling.fixed_num_workers > 1 and scaling.zero_stage < 3 and not keeps_graphs:
        yield "scaling.zero_stage 3", scaled(zero_stage=3)
    size, group = config.fixed_micro_batch_size, config.group_size
    if size > group:
        half = max(group, size // 2 // group * group)
        yield f"micro_batch_size_per_worker {half}", dataclasses.replace(config, micro_batch_size_per_worker=half)
    if evaluation.fixed_batch_size > 1:
        half = evaluation.fixed_batch_size // 2
        smaller = dataclasses.replace(evaluation, batch_size=half)
        yield f"evaluation.batch_size {half}", dataclasses.replace(config, evaluation=smaller)
    chunk = min(rewards.fixed_decode_chunk_size, size)
    if chunk > 1:
        yield f"rewards.decode_chunk_size {chunk // 2}", rewarded(decode_chunk_size=chunk // 2)
    cards = sum(node.gpus for node in facts.nodes) if facts is not None else 0
    if shares_cards(config) and cards >= scaling.fixed_num_workers + rewards.num_actors:
        apart = dataclasses.replace(
            scaled(gpus_per_worker=1.0), rewards=dataclasses.replace(rewards, gpus_per_actor=1.0)
        )
        yield "scaling.gpus_per_worker 1 with rewards.gpus_per_actor 1 (cards of their own)", apart
    if shares_cards(config):
        alone = rewarded(num_actors=0, min_actors=None, max_actors=None)
        yield "rewards.num_actors 0 (each worker scores its own samples)", alone
