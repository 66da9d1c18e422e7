"""Placement groups whose creator is gone, also those that it asked for while it was dying."""

from __future__ import annotations

import threading
import time

import pytest
import ray
from ray.util import placement_group, placement_group_table
from ray.util.placement_group import PlacementGroup

from ctrl_ray.cluster.abandoned_groups import give_back_abandoned_groups


@ray.remote(num_cpus=0)
class _Controller:
    """As Ray Train's when its workers die before it: it goes on asking for groups until its process ends."""

    def __init__(self) -> None:
        self._groups: list[PlacementGroup] = []
        threading.Thread(target=self._ask, daemon=True).start()

    def _ask(self) -> None:
        while True:
            self._groups.append(placement_group([{"CPU": 0.0001}]))
            time.sleep(0.002)

    def count(self) -> int:
        """Groups so far."""
        return len(self._groups)


@ray.remote(num_cpus=0)
class _Trial:
    """The controller is its child, and ends with it."""

    def __init__(self) -> None:
        self._controller = _Controller.remote()

    def count(self) -> int:
        """Groups of the controller so far."""
        return int(ray.get(self._controller.count.remote()))


def _held() -> set[str]:
    return {key for key, group in placement_group_table().items() if group["state"] != "REMOVED"}


@pytest.mark.usefixtures("ray_session")
def test_a_dead_controller_leaves_no_group_however_late_it_asked() -> None:
    others = _held()
    trial = _Trial.remote()
    limit = time.monotonic() + 60
    while ray.get(trial.count.remote()) < 3:
        assert time.monotonic() < limit, "the controller asks for nothing"
        time.sleep(0.05)
    living = give_back_abandoned_groups()
    assert living >= 3 and len(_held() - others) >= living  # what a living controller has is left to it

    ray.kill(trial)
    limit = time.monotonic() + 30
    while give_back_abandoned_groups() or _held() - others:
        assert time.monotonic() < limit, f"{len(_held() - others)} groups are still held"
        time.sleep(0.2)
