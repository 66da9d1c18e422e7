"""What the pool notes with Ray's autoscaling coordinator, and what an elastic group of Ray Train then counts."""

from __future__ import annotations

from typing import Any

import pytest

from ctrl_ray.config import RewardPoolConfig
from ctrl_ray.rewards import reservation
from ctrl_ray.rewards.pool import actor_options_of
from ctrl_ray.rewards.reservation import Reservation


class _Coordinator:
    """Ray's own coordinator, called as an actor but in this process."""

    def __init__(self, nodes: list[dict[str, Any]]) -> None:
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import _AutoscalingCoordinatorActor

        self.asked: list[list[dict[str, float]]] = []
        self.actor = _AutoscalingCoordinatorActor(
            send_resources_request=lambda bundles, **_: self.asked.append(bundles), get_cluster_nodes=lambda: nodes
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type("Method", (), {"remote": staticmethod(getattr(self.actor, name))})

    def room_for_workers(self, most: int) -> int:
        """Workers of one CPU that an elastic group counts; it asks for the most that it may have."""
        self.actor.request_resources("train", [{"CPU": 1.0}] * most, expire_after_s=60.0)
        return sum(int(node.get("CPU", 0)) for node in self.actor.get_reserved_resources("train").values())


def _nodes(*resources: dict[str, float]) -> list[dict[str, Any]]:
    return [{"NodeID": str(i), "Alive": True, "Resources": r, "Labels": {}} for i, r in enumerate(resources)]


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> _Coordinator:
    """Of two nodes with one CPU each; one may serve rewards."""
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as module

    found = _Coordinator(_nodes({"CPU": 1.0}, {"CPU": 1.0, "rewards": 1.0}))
    monkeypatch.setattr(module, "get_or_create_autoscaling_coordinator", lambda: found)
    return found


def _reservation(**settings: Any) -> Reservation:
    return Reservation("pool", actor_options_of(RewardPoolConfig(**settings)))


def test_an_elastic_group_does_not_count_what_the_pool_has(coordinator: _Coordinator) -> None:
    assert coordinator.room_for_workers(2) == 2  # what it would ask for, in vain
    coordinator.actor.cancel_request("train")
    pool = _reservation(node_resource="rewards")
    pool.hold(1)
    assert coordinator.room_for_workers(2) == 1
    pool.hold(0)
    coordinator.actor.cancel_request("train")
    assert coordinator.room_for_workers(2) == 2


def test_the_note_is_made_anew_only_when_it_changes_or_ages(
    coordinator: _Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(reservation.time, "monotonic", lambda: now)
    calls: list[int] = []
    request = coordinator.actor.request_resources
    coordinator.actor.request_resources = lambda **given: (calls.append(len(given["resources"])), request(**given))
    pool = _reservation(cpus_per_actor=0.5)
    for _ in range(3):
        pool.hold(1)
    pool.hold(2)
    now += 30
    pool.hold(2)
    assert calls == [1, 2, 2]
    assert coordinator.asked[-1] == [{"CPU": 0.5}, {"CPU": 0.5}]


def test_a_pool_lives_without_a_coordinator(monkeypatch: pytest.MonkeyPatch, logged: list[str]) -> None:
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as module

    def fail() -> Any:
        raise RuntimeError("no such actor")

    monkeypatch.setattr(module, "get_or_create_autoscaling_coordinator", fail)
    _reservation().hold(1)
    (line,) = logged
    assert "was not told what the reward pool takes (RuntimeError: no such actor)" in line


def test_actors_that_take_nothing_are_not_noted(coordinator: _Coordinator) -> None:
    _reservation(cpus_per_actor=0.0).hold(3)
    assert coordinator.asked == []
