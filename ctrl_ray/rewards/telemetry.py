"""What a reward pool tells about itself: through Ray's metrics, and as one value for the driver and for tests.

Ray exports the metrics with the prefix `ray_` (Prometheus, dashboard); every one has the tag `pool`, which names a dispatcher:

| name | kind | meaning |
|---|---|---|
| `ctrl_ray_reward_queue_length` | gauge | requests that wait for an actor |
| `ctrl_ray_reward_in_flight` | gauge | requests that actors have |
| `ctrl_ray_reward_actors` | gauge | actors that answer |
| `ctrl_ray_reward_latency_s` | histogram | seconds from the arrival of a request at the pool to its answer |
| `ctrl_ray_reward_busy_s` | counter | seconds that actors worked |
| `ctrl_ray_reward_requests` | counter | requests answered: its rate is the throughput |
| `ctrl_ray_reward_samples` | counter | samples answered |
| `ctrl_ray_reward_failed` | counter | requests that ended in an error |
| `ctrl_ray_reward_resent` | counter | requests sent again because their actor was lost or stuck |
| `ctrl_ray_reward_replaced` | counter | actors that were lost or stuck |
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from ray.util.metrics import Counter, Gauge, Histogram

_PREFIX = "ctrl_ray_reward_"
_TAG = "pool"
_LATENCY_BOUNDARIES_S = [0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorStats:
    """One actor at a moment."""

    process_id: int | None
    """On its node; None while it is being placed."""
    node_id: str | None
    """Ray's id of its node; None while it is being placed."""
    ready: bool
    """It has loaded its model and takes requests."""
    in_flight: int
    """Requests that it has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolStats:
    """The pool at a moment; counts are since its start."""

    queue_length: int = 0
    """Requests that wait for an actor."""
    in_flight: int = 0
    """Requests that actors have."""
    actors: tuple[ActorStats, ...] = ()
    """Those that answer or start."""
    requests: int = 0
    """Requests answered."""
    samples: int = 0
    """Samples answered."""
    forwards: int = 0
    """Calls of an actor that answered them; fewer than requests where these shared one."""
    failed: int = 0
    """Requests that ended in an error."""
    resent: int = 0
    """Requests sent again because their actor was lost or stuck."""
    replaced: int = 0
    """Actors that were lost or stuck."""
    busy_s: float = 0.0
    """Sum of the seconds that actors worked."""

    @property
    def num_ready(self) -> int:
        """Actors that take requests."""
        return sum(actor.ready for actor in self.actors)


def together(parts: Sequence[PoolStats]) -> PoolStats:
    """Those of several dispatchers as one: counts are added, actors joined."""
    return PoolStats(
        **{
            field.name: functools.reduce(operator.add, (getattr(part, field.name) for part in parts))
            for field in fields(PoolStats)
        }
    )


class Telemetry:
    """Counts what happens; every change goes to Ray's metrics too."""

    def __init__(self, pool: str) -> None:
        """pool: the value of the metrics' tag."""
        self._stats = PoolStats()
        self._gauges = {
            name: Gauge(_PREFIX + name, description, tag_keys=(_TAG,))
            for name, description in (
                ("queue_length", "Requests that wait for an actor."),
                ("in_flight", "Requests that actors have."),
                ("actors", "Actors that answer."),
            )
        }
        self._counters = {
            name: Counter(_PREFIX + name, description, tag_keys=(_TAG,))
            for name, description in (
                ("requests", "Requests answered."),
                ("samples", "Samples answered."),
                ("failed", "Requests that ended in an error."),
                ("resent", "Requests sent again because their actor was lost or stuck."),
                ("replaced", "Actors that were lost or stuck."),
                ("busy_s", "Seconds that actors worked."),
            )
        }
        self._latency = Histogram(
            _PREFIX + "latency_s",
            "Seconds from the arrival of a request at the pool to its answer.",
            boundaries=_LATENCY_BOUNDARIES_S,
            tag_keys=(_TAG,),
        )
        for metric in (*self._gauges.values(), *self._counters.values(), self._latency):
            metric.set_default_tags({_TAG: pool})

    def count(self, **amounts: float) -> None:
        """Add to counts, by name as in `PoolStats`."""
        self._stats = replace(self._stats, **{k: getattr(self._stats, k) + v for k, v in amounts.items()})
        for name, amount in amounts.items():
            if name in self._counters and amount > 0:
                self._counters[name].inc(amount)

    def answered(self, num_samples: int, latency_s: float) -> None:
        """One request has its answer."""
        self.count(requests=1, samples=num_samples)
        self._latency.observe(latency_s)

    def snapshot(self, queue_length: int, actors: tuple[ActorStats, ...]) -> PoolStats:
        """The pool now; sets the gauges."""
        in_flight = sum(actor.in_flight for actor in actors)
        stats = replace(self._stats, queue_length=queue_length, in_flight=in_flight, actors=actors)
        self._gauges["queue_length"].set(queue_length)
        self._gauges["in_flight"].set(in_flight)
        self._gauges["actors"].set(stats.num_ready)
        return stats
