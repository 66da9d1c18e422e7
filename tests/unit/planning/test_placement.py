"""Shares of cards, and how many workers stated nodes hold, by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ctrl_ray.cluster.resources import NodeFacts
from ctrl_ray.config import ControlConfig, EvaluationConfig, RewardPoolConfig, ScalingConfig, TrainConfig
from ctrl_ray.planning.placement import actors_on_a_card, cards_needed, on_node, place_workers, share_cards

GPU_NODE = NodeFacts(64.0, 8.0, None, 80 * 10**9)


def _config(num_actors: int = 1, *, asynchronous: float = 0.0, placement: Any = "pack", **scaling: Any) -> TrainConfig:
    actor, most = scaling.pop("gpus_per_actor", "auto"), scaling.pop("max_actors", None)
    return TrainConfig(
        controls={"size": ControlConfig(classes=("a", "b"))},
        global_batch_size=256,
        rewards=RewardPoolConfig(num_actors=num_actors, max_actors=most, gpus_per_actor=actor, placement=placement),
        evaluation=EvaluationConfig(asynchronous=bool(asynchronous), num_gpus=asynchronous),
        scaling=ScalingConfig(**{"use_gpu": True, "gpus_per_worker": "auto", "num_workers": 2, **scaling}),
    )


def _shares(config: TrainConfig) -> tuple[float, float]:
    decided = share_cards(config)
    return decided.scaling.fixed_gpus_per_worker, decided.rewards.fixed_gpus_per_actor


@pytest.mark.parametrize(
    ("config", "worker", "actor"),
    [
        (_config(0), 1.0, 0.0),
        (_config(1), 0.75, 0.25),
        (_config(4), 0.75, 0.0625),
        (_config(3), 0.7501, 0.0833),  # rounded down, so that all three have room
        (_config(1, max_actors=4), 0.75, 0.0625),  # the pool may grow
        (_config(1, gpus_per_actor=0.1, max_actors=4), 0.6, 0.1),
        (_config(1, gpus_per_actor=0.4), 0.6, 0.4),
        (_config(2, gpus_per_actor=0.4), 1.0, 0.4),  # both could come to lie on one card, which no worker would have
        (_config(1, gpus_per_actor=1.0), 1.0, 1.0),
        (_config(1, gpus_per_worker=1.0), 1.0, 1.0),
        (_config(2, gpus_per_worker=0.6), 0.6, 0.2),
        (_config(0, asynchronous=0.2), 0.8, 0.0),
        (_config(1, asynchronous=0.2), 0.55, 0.25),
        (_config(1, use_gpu=False), 1.0, 0.0),
    ],
)
def test_shares_leave_a_worker_room_on_every_card(config: TrainConfig, worker: float, actor: float) -> None:
    assert _shares(config) == (pytest.approx(worker), pytest.approx(actor))


@pytest.mark.parametrize("num_actors", [0, 1, 2, 4, 7, 32])
@pytest.mark.parametrize(
    ("nodes", "cards"),
    [
        ([NodeFacts(8.0, 1.0, None)], 1),
        ([GPU_NODE], 8),
        ([GPU_NODE] * 4, 32),
        ([GPU_NODE] * 3 + [NodeFacts(32.0, 4.0, None)], 28),
    ],
)
def test_no_card_is_without_a_worker(num_actors: int, nodes: list[NodeFacts], cards: int) -> None:
    """Whatever the size of the pool, as long as there are CPUs for its actors."""
    config = share_cards(_config(num_actors, cpus_per_worker=1.0))
    config = _replaced(config, cpus_per_actor=0.1)
    assert place_workers(config, nodes) == cards
    assert cards_needed(_workers(config, cards)) == cards


def _replaced(config: TrainConfig, **rewards: Any) -> TrainConfig:
    return dataclasses.replace(config, rewards=dataclasses.replace(config.rewards, **rewards))


def _workers(config: TrainConfig, number: int) -> TrainConfig:
    return dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, num_workers=number))


def test_actors_with_large_shares_take_cards() -> None:
    """As Ray packs them: two of 0.4 on one card, a third one on another; an evaluation takes its share too."""
    two = share_cards(_config(2, gpus_per_actor=0.4))
    assert place_workers(two, [GPU_NODE]) == 7
    assert place_workers(share_cards(_config(3, gpus_per_actor=0.4)), [GPU_NODE]) == 6
    assert place_workers(share_cards(_config(2, gpus_per_actor=2.0)), [GPU_NODE]) == 4
    assert cards_needed(two) == 3
    fixed = _config(0, asynchronous=0.2, gpus_per_worker=1.0)
    assert place_workers(share_cards(fixed), [GPU_NODE]) == 7
    assert place_workers(share_cards(_config(0, asynchronous=0.2)), [GPU_NODE]) == 8


def test_cpus_bound_the_workers_too() -> None:
    nodes = [NodeFacts(9.0, 8.0, None)]
    assert place_workers(share_cards(_config(1, cpus_per_worker=4.0)), nodes) == 2
    cpu = share_cards(_config(1, use_gpu=False, cpus_per_worker=2.0, gpus_per_worker=1.0))
    assert place_workers(cpu, [NodeFacts(3.0, 0.0, None)] * 2) == 2  # one a node: neither holds 2 more beside the actor
    assert on_node(NodeFacts(3.0, 0.0, None), cpu) == [(1, 0), (1, 1)]


def test_the_most_actors_on_one_card() -> None:
    """Ray packs small shares onto one card of a node; 'spread' has them on several nodes."""
    assert actors_on_a_card(share_cards(_config(4)), [GPU_NODE] * 4) == 4
    assert actors_on_a_card(share_cards(_config(4, placement="spread")), [GPU_NODE] * 4) == 1
    assert actors_on_a_card(share_cards(_config(3, gpus_per_actor=0.4)), [GPU_NODE]) == 2
    assert actors_on_a_card(share_cards(_config(0)), [GPU_NODE]) == 0
    assert actors_on_a_card(share_cards(_config(1, gpus_per_actor=2.0)), [GPU_NODE]) == 1
