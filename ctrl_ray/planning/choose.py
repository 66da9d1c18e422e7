"""Deciding what a config leaves open ('auto'): workers, shares of cards, micro-batch, gradient checkpointing, kept graphs,
batch of the evaluation, images decoded at a time. The only place that does."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ctrl_ray.cluster.resources import ClusterFacts
from ctrl_ray.config import TrainConfig
from ctrl_ray.config.values import Auto
from ctrl_ray.errors import ResourceError
from ctrl_ray.planning.fits import PlanOf, memory_fit
from ctrl_ray.planning.placement import place_workers, share_cards, shares_cards
from ctrl_ray.planning.plan import num_branches
from ctrl_ray.wording import counted

CHECKPOINTING_SLOWDOWN = 1.3
"""Time of an update with gradient checkpointing over that without, at the same micro-batch (counted operations)."""
KEPT_GRAPHS_SPEEDUP = 1.3
"""Time of an update over that with kept graphs (`tests.benchmarks.graphs`)."""
OVERHEAD_ROWS = 2.0
"""What a denoiser call costs beside its rows, in rows: a call of r rows takes as long as r + so many. Stated, not measured."""
_SEARCHES = 4
_KEEP_GRAPHS = "estimator.keep_graphs"
LARGEST_EVALUATION_BATCH = 16
LARGEST_DECODE_CHUNK = 8
"""Larger ones gain nothing."""


@dataclass(frozen=True)
class Decided:
    """A config whose values are all decided."""

    config: TrainConfig
    why: tuple[str, ...]
    """Lines for people; empty where nothing was left open."""


def decide(config: TrainConfig, facts: ClusterFacts | None, plan_of: PlanOf, estimate: PlanOf | None = None) -> Decided:
    """Replace every 'auto' of the config.

    First the shares of cards and the number of workers: as many as the cluster places beside the reward pool, and as the
    global batch has groups. Then the fastest micro-batch, gradient checkpointing and kept graphs by `_time`, of those that
    fit; then the largest batch of the evaluation and chunk of images that still fit. `estimate` is a fast `plan_of` for the
    search, which may get better by what `plan_of` counts; what is chosen is checked by `plan_of`. Raises ResourceError where
    not even one worker has room, or where memory is to decide and the cluster does not say what it has; if graphs alone are
    to be decided they are then not kept.
    """
    config, workers = _decide_workers(share_cards(config), facts)
    config, sizes = _decide_sizes(config, facts, plan_of, estimate or plan_of)
    return Decided(config, (*workers, *sizes))


def _decide_workers(config: TrainConfig, facts: ClusterFacts | None) -> tuple[TrainConfig, list[str]]:
    scaling, rewards = config.scaling, config.rewards
    if scaling.num_workers != "auto":
        return config, []
    if facts is None:
        raise ResourceError(
            "scaling.num_workers is auto, but no cluster can be asked what it has; give a number, or connect to a cluster"
        )
    room = place_workers(config, facts.nodes)
    if room < 1:
        raise ResourceError(
            f"scaling.num_workers is auto, but {facts.where} ({facts.described}) has no room for a worker of "
            f"{_per_worker(config)} beside {counted(rewards.num_actors, 'reward actor')}; lower rewards.num_actors or "
            "scaling.cpus_per_worker, use a larger cluster, or plan for machines that are not there with --dry-run "
            "--machines 4x8x80GB"
        )
    groups = config.global_batch_size // config.group_size
    workers = min(room, groups)
    line = f"{workers} worker{'s' * (workers != 1)}: room for {room} of {_per_worker(config)}"
    line += f"{' beside the reward pool' if rewards.num_actors else ''} on {facts.where} ({facts.described})"
    if workers < room:
        line += f"; {workers} is one for each group of the global batch ({config.global_batch_size})"
    cards = math.floor(sum(node.gpus for node in facts.nodes))
    if scaling.use_gpu and room < cards:
        line += f"; {cards - room} GPUs have no worker"
    lines = [line]
    if shares_cards(config):
        lines.append(
            f"the pool is on the workers' cards: {scaling.gpus_per_worker:g} of a card for a worker, "
            f"{rewards.gpus_per_actor:g} for an actor; the update waits for the card that does both"
        )
    return dataclasses.replace(config, scaling=dataclasses.replace(scaling, num_workers=workers)), lines


def _decide_sizes(
    config: TrainConfig, facts: ClusterFacts | None, plan_of: PlanOf, estimate: PlanOf
) -> tuple[TrainConfig, list[str]]:
    """Micro-batch, checkpointing, evaluation batch and decode chunk."""
    asked = config
    if isinstance(config.micro_batch_size_per_worker, int):
        share = config.worker_shares[1]
        config = dataclasses.replace(config, micro_batch_size_per_worker=min(share, config.micro_batch_size_per_worker))
        estimate = plan_of  # one size is soon counted
    names = [name for name, value in open_values(config).items() if value == "auto"]
    if not names:
        return config, []
    candidates = sorted(_candidates(_smallest(config), asked), key=_time)
    smallest = min(
        candidates,
        key=lambda c: (not c.scaling.gradient_checkpointing, c.estimator.fixed_keep_graphs, c.fixed_micro_batch_size),
    )
    fit = memory_fit(estimate(candidates[0]), candidates[0], facts)
    if fit.answer == "unknown" and names == [_KEEP_GRAPHS]:
        return smallest, [f"{_KEEP_GRAPHS} False: {fit.reason}"]
    if fit.answer == "unknown":
        raise ResourceError(
            f"{', '.join(names)} cannot be decided: {fit.reason}. Give numbers; python -m ctrl_ray.train --dry-run "
            "--machines 4x8x80GB says which ones suit machines that you state"
        )
    trains, missed = _first_that_fits(candidates, smallest, facts, plan_of, estimate)
    for _ in range(_SEARCHES):  # what was counted for the choice makes the estimate better
        before = trains
        trains, missed = _first_that_fits(candidates, smallest, facts, plan_of, estimate)
        if trains == before:
            break
    chosen = _grow(trains, asked, facts, plan_of, estimate)
    decided = open_values(chosen)
    lines = [", ".join(f"{name} {decided[name]}" for name in names)]
    if missed is not None:
        lines.append(missed)
    return chosen, lines


def open_values(config: TrainConfig) -> dict[str, object]:
    """Settings that may be 'auto', by their names, and what this config has for them."""
    scaling, rewards = config.scaling, config.rewards
    return {
        "scaling.num_workers": scaling.num_workers,
        "scaling.gpus_per_worker": scaling.gpus_per_worker,
        "rewards.gpus_per_actor": rewards.gpus_per_actor,
        "micro_batch_size_per_worker": config.micro_batch_size_per_worker,
        "scaling.gradient_checkpointing": scaling.gradient_checkpointing,
        _KEEP_GRAPHS: config.estimator.keep_graphs,
        "evaluation.batch_size": config.evaluation.batch_size,
        "rewards.decode_chunk_size": rewards.decode_chunk_size,
    }


def _smallest(config: TrainConfig) -> TrainConfig:
    """With the smallest evaluation and decoding: training comes first."""
    return _sized(
        config,
        1 if config.evaluation.batch_size == "auto" else config.evaluation.fixed_batch_size,
        1 if config.rewards.decode_chunk_size == "auto" else config.rewards.fixed_decode_chunk_size,
    )


def _sized(config: TrainConfig, evaluation: int, chunk: int) -> TrainConfig:
    return dataclasses.replace(
        config,
        evaluation=dataclasses.replace(config.evaluation, batch_size=evaluation),
        rewards=dataclasses.replace(config.rewards, decode_chunk_size=chunk),
    )


def _candidates(config: TrainConfig, asked: TrainConfig) -> Iterator[TrainConfig]:
    """Every micro-batch that shares a worker's part of the batch evenly, with checkpointing, with kept graphs and without."""
    group, scaling = config.group_size, config.scaling
    groups = config.worker_shares[1] // group
    if asked.micro_batch_size_per_worker == "auto":
        fewest = min(groups, 2 if config.rewards.num_actors else 1)  # one is scored while the next is rolled out
        sizes = sorted({group * -(-groups // rounds) for rounds in range(fewest, groups + 1)})
    else:
        sizes = [config.fixed_micro_batch_size]
    for keep, checkpointing in itertools.product(
        _either(config.estimator.keep_graphs), _either(scaling.gradient_checkpointing)
    ):
        if config.estimator.keep_graphs == "auto" and keep and (checkpointing or not config.can_keep_graphs):
            continue
        for size in sizes:
            yield dataclasses.replace(
                config,
                micro_batch_size_per_worker=size,
                estimator=dataclasses.replace(config.estimator, keep_graphs=keep),
                scaling=dataclasses.replace(scaling, gradient_checkpointing=checkpointing),
            )


def _either(setting: bool | Auto) -> tuple[bool, ...]:
    return (False, True) if isinstance(setting, str) else (setting,)


def _time(config: TrainConfig) -> float:
    """Relative time of an update: the rows of the largest share and what its calls cost beside them."""
    rows = config.worker_shares[1] * num_branches(config) + config.num_micro_batches * OVERHEAD_ROWS
    rows *= CHECKPOINTING_SLOWDOWN if config.scaling.fixed_gradient_checkpointing else 1.0
    return rows / (KEPT_GRAPHS_SPEEDUP if config.estimator.fixed_keep_graphs else 1.0)


def _grow(
    config: TrainConfig, asked: TrainConfig, facts: ClusterFacts | None, plan_of: PlanOf, estimate: PlanOf
) -> TrainConfig:
    """The largest evaluation batch, then the largest decode chunk, that fit beside what was decided; where a worker decodes
    itself, the largest chunk that takes no more than training does."""
    samples = max(config.evaluation.num_samples, config.evaluation.final_num_samples)
    most = -(-samples // config.scaling.fixed_num_workers)
    if asked.evaluation.batch_size == "auto":
        chunk = config.rewards.fixed_decode_chunk_size
        larger = [_sized(config, size, chunk) for size in _halves(min(LARGEST_EVALUATION_BATCH, most))]
        config, _ = _first_that_fits(larger, config, facts, plan_of, estimate)
    if asked.rewards.decode_chunk_size == "auto":
        batch = config.evaluation.fixed_batch_size
        peak = plan_of(config).memory.peak
        sizes = _halves(min(LARGEST_DECODE_CHUNK, config.fixed_micro_batch_size))
        larger = [_sized(config, batch, size) for size in sizes]
        larger = [changed for changed in larger if plan_of(changed).memory.peak <= peak] or [config]
        config, _ = _first_that_fits(larger, config, facts, plan_of, estimate)
    return config


def _halves(largest: int) -> list[int]:
    """largest, its half, … 1."""
    return [largest] if largest == 1 else [largest, *_halves(largest // 2)]


def _first_that_fits(
    candidates: Sequence[TrainConfig],
    smallest: TrainConfig,
    facts: ClusterFacts | None,
    plan_of: PlanOf,
    estimate: PlanOf,
) -> tuple[TrainConfig, str | None]:
    """The first that fits, by the estimate and when it is counted, with a word about the one before; else the smallest."""
    missed = None
    for candidate in candidates:
        if candidate == smallest:
            return smallest, missed
        for plan in (estimate, plan_of):
            fit = memory_fit(plan(candidate), candidate, facts)
            if fit.answer == "no":
                break
        else:
            return candidate, missed
        text = "with" if candidate.scaling.gradient_checkpointing else "without"
        how = "with kept graphs" if candidate.estimator.fixed_keep_graphs else f"{text} gradient checkpointing"
        missed = (
            f"micro-batch {candidate.micro_batch_size_per_worker} {how} would be faster, but does not fit: {fit.reason}"
        )
    return smallest, missed


def _per_worker(config: TrainConfig) -> str:
    if not config.scaling.use_gpu:
        return counted(config.scaling.cpus_per_worker, "CPU")
    share = config.scaling.fixed_gpus_per_worker
    return "one GPU" if share == 1 else counted(share, "GPU")
