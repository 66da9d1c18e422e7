"""Rewards beside which something happens, at a chosen request of a chosen worker."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.model import RewardModelSpec, load_reward_model
from ctrl_ray.rewards.protocol import PendingRewards


@dataclasses.dataclass(frozen=True)
class Faulty:
    """Rewards beside which something breaks on one worker, in the middle of an update."""

    rewards: PooledRewards | RewardModelSpec
    rank: int
    request: int
    """Counted from 0 in that worker's process."""
    fault: Callable[[PendingRewards], PendingRewards]

    def for_worker(self, rank: int) -> FaultyRewards:
        """What the worker calls."""
        if isinstance(self.rewards, RewardModelSpec):
            return FaultyRewards(LocalRewards(load_reward_model(self.rewards)), self, rank)
        return FaultyRewards(self.rewards.for_worker(rank), self, rank)

    def class_log_probs(self, *arguments: Any) -> Any:
        """For samples outside of training, where nothing breaks."""
        return self._of_pool().class_log_probs(*arguments)

    def decode(self, *arguments: Any) -> Any:
        """Likewise."""
        return self._of_pool().decode(*arguments)

    def _of_pool(self) -> PooledRewards:
        assert isinstance(self.rewards, PooledRewards)
        return self.rewards.for_worker(0)


class FaultyRewards:
    """One worker's."""

    def __init__(self, rewards: Any, plan: Faulty, rank: int) -> None:
        self._rewards, self._plan, self._rank, self._requests = rewards, plan, rank, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rewards, name)

    def submit(self, *arguments: Any) -> PendingRewards:
        """As the rewards do, but for one request of one rank."""
        pending = self._rewards.submit(*arguments)
        if (self._rank, self._requests) == (self._plan.rank, self._plan.request):
            pending = self._plan.fault(pending)
        self._requests += 1
        return pending
