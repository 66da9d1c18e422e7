"""Which share of a card workers and reward actors get, and how many workers the nodes of a cluster hold."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from ctrl_ray.cluster.resources import NodeFacts
from ctrl_ray.config import TrainConfig

POOL_SHARE = 0.25
"""Of a card that it shares with a worker: what 'auto' gives the whole reward pool."""
_SMALLEST_SHARE = 1e-4
"""Ray counts GPUs in ten thousandths."""
_ROUNDING = 1e-9


def share_cards(config: TrainConfig) -> TrainConfig:
    """`config` with `scaling.gpus_per_worker` and `rewards.gpus_per_actor` as numbers.

    Ray puts a small share on the card that is fullest already, so all actors of a node come to lie on one card. Shares are
    therefore so small that a worker has room on every card, wherever Ray puts the actors. Where what the actors (and
    asynchronous evaluation) ask for is half a card or more, workers get whole cards, and the others have cards of their own.
    """
    scaling, rewards, beside = config.scaling, config.rewards, config.evaluation
    evaluation = beside.num_gpus if beside.asynchronous and scaling.use_gpu else 0.0
    actor = rewards.gpus_per_actor
    if isinstance(actor, str):
        actor = _actor_share(config, evaluation)
    worker = scaling.gpus_per_worker
    if isinstance(worker, str):
        others = rewards.actor_bounds[1] * actor + evaluation
        worker = round(1 - others, 4) if scaling.use_gpu and others < 0.5 else 1.0
    return dataclasses.replace(
        config,
        scaling=dataclasses.replace(scaling, gpus_per_worker=worker),
        rewards=dataclasses.replace(rewards, gpus_per_actor=actor),
    )


def _actor_share(config: TrainConfig, evaluation: float) -> float:
    """An equal part, for each actor that there may be, of what a worker and an evaluation leave of a card; 1 where they
    leave nothing."""
    worker, most = config.scaling.gpus_per_worker, config.rewards.actor_bounds[1]
    if not config.scaling.use_gpu or most == 0:
        return 0.0
    pool = POOL_SHARE if evaluation + POOL_SHARE < 0.5 else 0.0
    left = pool if isinstance(worker, str) else 1 - worker - evaluation
    if left < _SMALLEST_SHARE:
        return 1.0
    return max(_SMALLEST_SHARE, round(math.floor(left / most / _SMALLEST_SHARE + _ROUNDING) * _SMALLEST_SHARE, 4))


def shares_cards(config: TrainConfig) -> bool:
    """Whether reward actors lie on workers' cards."""
    worker, actor = config.scaling.fixed_gpus_per_worker, config.rewards.fixed_gpus_per_actor
    return config.scaling.use_gpu and config.rewards.num_actors > 0 and 0 < actor <= 1 - worker + _ROUNDING


def actors_on_a_card(config: TrainConfig, nodes: Sequence[NodeFacts]) -> int:
    """The most reward actors that Ray may put on one card: beside a worker where they share cards."""
    share, actors = config.rewards.fixed_gpus_per_actor, config.rewards.num_actors
    if not share or not actors:
        return 0
    room = 1 - config.scaling.fixed_gpus_per_worker if shares_cards(config) else 1.0
    most = min(actors, max(1, math.floor(room / share + _ROUNDING)))
    with_cards = sum(node.gpus >= share for node in nodes)
    if config.rewards.placement == "spread" and with_cards:
        most = min(most, math.ceil(actors / with_cards))
    return most


def cards_needed(config: TrainConfig) -> int:
    """Whole cards of a run: one for each worker, and those that reward actors have to themselves."""
    workers = config.scaling.fixed_num_workers if config.scaling.use_gpu else 0
    if shares_cards(config):
        return workers
    return workers + math.ceil(config.rewards.num_actors * config.rewards.fixed_gpus_per_actor - _ROUNDING)


def place_workers(config: TrainConfig, nodes: Sequence[NodeFacts]) -> int:
    """How many workers the nodes hold beside the reward actors and an asynchronous evaluation, which take the first room
    that they find."""
    free = [_Free(node) for node in nodes]
    for _ in range(config.rewards.num_actors):
        _take_actor(config, free)
    beside = config.evaluation
    if beside.asynchronous:
        any(node.take(beside.num_cpus, beside.num_gpus) for node in free)
    return sum(node.room(config) for node in free)


def on_node(node: NodeFacts, config: TrainConfig) -> list[tuple[int, int]]:
    """Every (workers, actors) that may share a node: any number of actors that it holds, and workers in the rest."""
    free, found = [_Free(node)], []
    for actors in range(config.rewards.num_actors + 1):
        if actors and not _take_actor(config, free):
            break
        workers = min(config.scaling.fixed_num_workers, free[0].room(config))
        if workers + actors:
            found.append((workers, actors))
    return found


class _Free:
    """What is free on a node: CPUs, and a share of each card."""

    def __init__(self, node: NodeFacts) -> None:
        self.cpus = node.cpus
        self.cards = [1.0] * math.floor(node.gpus + _ROUNDING)

    def take(self, cpus: float, gpus: float) -> bool:
        """As Ray does it: a share of a card comes from the fullest card that has it."""
        count = math.ceil(gpus - _ROUNDING) if gpus >= 1 else int(gpus > 0)
        share = 1.0 if gpus >= 1 else gpus
        fitting = sorted(i for i, left in enumerate(self.cards) if left + _ROUNDING >= share)
        if self.cpus + _ROUNDING < cpus or len(fitting) < count:
            return False
        self.cpus -= cpus
        for index in sorted(fitting, key=lambda i: self.cards[i])[:count]:
            self.cards[index] -= share
        return True

    def room(self, config: TrainConfig) -> int:
        """Workers that fit."""
        by_cpu = math.floor(self.cpus / config.scaling.cpus_per_worker + _ROUNDING)
        if not config.scaling.use_gpu:
            return max(0, by_cpu)
        share = config.scaling.fixed_gpus_per_worker
        return max(0, min(by_cpu, sum(left + _ROUNDING >= share for left in self.cards)))


def _take_actor(config: TrainConfig, free: Sequence[_Free]) -> bool:
    rewards = config.rewards
    return any(node.take(rewards.cpus_per_actor, rewards.fixed_gpus_per_actor) for node in free)
