"""The pool's queue: first come, first served, and which requests share a forward pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False, kw_only=True, slots=True)
class Request:
    """One request from its arrival to its answer."""

    method: str
    """What to call, see `ctrl_ray.rewards.actor.METHODS`."""
    payload: Any
    """Reference to its arguments in the object store; the pool's dispatcher never reads them."""
    num_samples: int
    """Size of its batch."""
    arrived_s: float
    """Monotonic time of its arrival."""
    answer: Any = None
    """The future that the caller waits for."""
    losses: int = 0
    """Actors that were lost or stuck while they worked on it."""
    alone: bool = False
    """It must not share a forward: one that it shared has failed."""


class RequestQueue:
    """Requests that no actor has yet."""

    def __init__(self, *, max_batch_size: int, max_batch_delay_s: float, shared: bool) -> None:
        """shared: requests may share a forward pass, of at most max_batch_size samples."""
        self._requests: deque[Request] = deque()
        self._max_batch_size, self._max_batch_delay_s, self._shared = max_batch_size, max_batch_delay_s, shared

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def append(self, request: Request) -> None:
        """A new request, behind all others."""
        self._requests.append(request)

    def put_back(self, request: Request) -> None:
        """A request that was taken before, in front of all others."""
        self._requests.appendleft(request)

    def remove(self, request: Request) -> None:
        """Take out one request."""
        self._requests.remove(request)

    def take(self, now_s: float) -> tuple[list[Request], float]:
        """Requests for one call of an actor, oldest first; or none, and the seconds after which to ask again.

        Not empty unless the queue is, or the oldest request may still wait for others to share its forward.
        """
        if not self._requests:
            return [], 0.0
        head = self._requests[0]
        if not self._may_share(head):
            return [self._requests.popleft()], 0.0
        batch: list[Request] = []
        num_samples, full = 0, False
        for request in filter(self._may_share, self._requests):
            full = full or num_samples + request.num_samples > self._max_batch_size
            if batch and full:
                break
            batch.append(request)
            num_samples += request.num_samples
        wait_s = head.arrived_s + self._max_batch_delay_s - now_s
        if wait_s > 0 and not full and num_samples < self._max_batch_size:
            return [], wait_s
        for request in batch:
            self._requests.remove(request)
        return batch, 0.0

    def _may_share(self, request: Request) -> bool:
        return self._shared and request.method == "evaluate" and not request.alone
