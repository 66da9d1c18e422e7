"""Several dispatchers as one pool: how actors are shared out, and figures added up."""

from __future__ import annotations

import pytest

from ctrl_ray.config import RewardPoolConfig
from ctrl_ray.rewards.pool import WORKERS_A_DISPATCHER, num_dispatchers, shares_of
from ctrl_ray.rewards.telemetry import ActorStats, PoolStats, together


@pytest.mark.parametrize(
    ("num_workers", "fewest_actors", "expected"),
    [
        (1, 8, 1),
        (WORKERS_A_DISPATCHER, 8, 1),
        (WORKERS_A_DISPATCHER + 1, 8, 2),
        (8 * WORKERS_A_DISPATCHER, 8, 8),
        (8 * WORKERS_A_DISPATCHER, 3, 3),  # none without an actor
    ],
)
def test_a_dispatcher_for_so_many_workers(num_workers: int, fewest_actors: int, expected: int) -> None:
    config = RewardPoolConfig(num_actors=8, min_actors=fewest_actors, max_actors=16)
    assert num_dispatchers(config, num_workers) == expected


def test_actors_are_shared_out_evenly() -> None:
    """7 of at least 4 and at most 9 over 3 dispatchers."""
    shares = shares_of(RewardPoolConfig(num_actors=7, min_actors=4, max_actors=9, timeout_s=11), 3)
    assert [(share.min_actors, share.num_actors, share.max_actors) for share in shares] == [
        (2, 3, 3),
        (1, 2, 3),
        (1, 2, 3),
    ]
    assert {share.timeout_s for share in shares} == {11}


def test_figures_of_dispatchers_are_added() -> None:
    one, other = (ActorStats(process_id=pid, node_id="a", ready=pid == 1, in_flight=pid) for pid in (1, 2))
    parts = [
        PoolStats(queue_length=1, in_flight=1, actors=(one,), requests=3, samples=24, busy_s=0.5),
        PoolStats(queue_length=2, in_flight=2, actors=(other,), requests=4, samples=32, failed=1, busy_s=0.25),
    ]
    whole = together(parts)
    assert whole == PoolStats(
        queue_length=3, in_flight=3, actors=(one, other), requests=7, samples=56, failed=1, busy_s=0.75
    )
    assert whole.num_ready == 1 and together(parts[:1]) == parts[0]
