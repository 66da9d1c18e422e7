"""The reward pool as the driver sees it: started before the workers, stopped after them.

One dispatcher serves `WORKERS_A_DISPATCHER` workers. Where a run has more, the pool has several, each with a share of the
actors and of the workers, and with all that one alone guarantees: they know nothing of each other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import uuid4

import ray
from ray import cloudpickle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ctrl_ray.config import RewardPoolConfig
from ctrl_ray.errors import ConfigError, CtrlRayError, ResourceError, RewardError
from ctrl_ray.rewards.analytic import AnalyticRewardModel
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.dispatcher import RewardDispatcher
from ctrl_ray.rewards.model import RewardModel, RewardModelSpec
from ctrl_ray.rewards.telemetry import PoolStats, together
from ctrl_ray.wording import counted

WORKERS_A_DISPATCHER = 128
"""They ask a dispatcher for a twentieth of what it can pass on, and a burst of all of them has gone in about a second
(`python -m tests.benchmarks.scaling`)."""
_NODE_RESOURCE_SHARE = 0.001
_LARGEST_INLINE_BYTES = 50_000
_MAX_CONCURRENT_REQUESTS = 100_000  # the workers bound their requests themselves


class RewardPool:
    """The dispatchers and their actors; a context manager whose end stops them. Workers get `client()`.

    with start_reward_pool(spec, RewardPoolConfig(num_actors=2)) as pool:
        pending = pool.client().for_worker(0).submit(latents, prompts, labels, strengths)
        answer = pending.result()  # log-probabilities, and their gradient at the latents
    """

    def __init__(
        self, dispatchers: Sequence[Any], config: RewardPoolConfig, controls: dict[str, int], given: Any
    ) -> None:
        self.config = config
        self.controls = controls
        self._dispatchers = tuple(dispatchers)
        self._given = given  # new actors read it: it must stay in the object store

    def client(self) -> PooledRewards:
        """A picklable handle on the pool, to be sent to training workers."""
        return PooledRewards(
            self._dispatchers,
            self.controls,
            timeout_s=self.config.timeout_s,
            chunk_size=self.config.fixed_decode_chunk_size,
            max_pending=self.config.max_pending_per_worker,
        )

    def stats(self) -> PoolStats:
        """Queue, actors and counts now; RewardError when the pool does not answer within rewards.timeout_s."""
        try:
            parts = [dispatcher.stats.remote() for dispatcher in self._dispatchers]
            return together(ray.get(parts, timeout=self.config.timeout_s))
        except (RayActorError, GetTimeoutError) as error:
            raise RewardError(f"the reward pool does not answer: {error}") from None

    def shutdown(self) -> None:
        """Stop every actor; a request still under way fails with a RewardError. Safe to call twice."""
        _stop(self._dispatchers)
        self._given = None

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()


def start_reward_pool(
    spec: RewardModelSpec,
    config: RewardPoolConfig,
    *,
    num_workers: int = 1,
    model: RewardModel | AnalyticRewardModel | None = None,
    placement_timeout_s: float = 300.0,
    actor_options: Mapping[str, Any] | None = None,
    on_wait: Callable[[], None] = lambda: None,
) -> RewardPool:
    """Start `config.num_actors` actors on the connected cluster and wait until each has loaded the model of `spec`.

    The config decides an actor's device, threads and chunk size, whatever the spec says. `num_workers` is how many will
    ask, at most: `num_dispatchers` says how many dispatchers that takes. `model` is a reward model
    (on the CPU) that the actors use instead of loading one; `actor_options` goes to Ray (`scheduling_strategy`,
    `resources`, `runtime_env`, ...) and overrides `actor_options_of(config)`; `on_wait` is called about once a second
    until the pool stands. Raises ResourceError when the actors have
    not started within `placement_timeout_s`, ModelError when the model cannot be loaded, RewardError when an actor dies
    while loading or takes longer than `config.timeout_s`.
    """
    if config.num_actors < 1:
        raise ConfigError(
            f"rewards.num_actors is {config.num_actors}; a pool needs at least 1 (0 means LocalRewards in each worker)"
        )
    spec = dataclasses.replace(
        spec,
        device="cuda" if config.fixed_gpus_per_actor > 0 else "cpu",
        threads=config.threads_per_actor or max(1, math.ceil(config.cpus_per_actor)),
        decode_chunk_size=config.fixed_decode_chunk_size,
    )
    given: Any = cloudpickle.dumps((spec, model))
    if len(given) > _LARGEST_INLINE_BYTES:
        given = [ray.put(given)]
    options = {**actor_options_of(config), **(actor_options or {})}
    dispatchers = [
        ray.remote(RewardDispatcher)
        .options(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=_MAX_CONCURRENT_REQUESTS,
            # soft would let Ray put it on any node
            scheduling_strategy=NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False),
        )
        # a large one by reference: a restart of the dispatcher then needs this process, as the run does anyway
        .remote(given, share, options, uuid4().hex[:8])
        for share in shares_of(config, num_dispatchers(config, num_workers))
    ]
    try:
        controls = _start(dispatchers, config, placement_timeout_s, on_wait)
    except BaseException:
        _stop(dispatchers)
        raise
    return RewardPool(dispatchers, config, controls, given)


def num_dispatchers(config: RewardPoolConfig, num_workers: int) -> int:
    """One for every WORKERS_A_DISPATCHER workers, and never so many that one might have no actor."""
    return max(1, min(math.ceil(num_workers / WORKERS_A_DISPATCHER), config.actor_bounds[0]))


def shares_of(config: RewardPoolConfig, count: int) -> list[RewardPoolConfig]:
    """The pool's configuration in `count` parts: actors at the start, fewest and most of them are shared out evenly."""
    low, high = config.actor_bounds
    return [
        dataclasses.replace(
            config,
            num_actors=_part(config.num_actors, index, count),
            min_actors=_part(low, index, count),
            max_actors=_part(high, index, count),
        )
        for index in range(count)
    ]


def _part(total: int, index: int, count: int) -> int:
    """Of `total` things in `count` parts, none of which has two more than another."""
    return total // count + (index < total % count)


def actor_options_of(config: RewardPoolConfig) -> dict[str, Any]:
    """What Ray is asked for each actor. Ray restarts none of them: the dispatcher replaces them."""
    options: dict[str, Any] = {
        "num_cpus": config.cpus_per_actor,
        "num_gpus": config.fixed_gpus_per_actor,
        "max_restarts": 0,
        "scheduling_strategy": {"pack": "DEFAULT", "spread": "SPREAD"}[config.placement],
    }
    if config.node_resource is not None:
        options["resources"] = {config.node_resource: _NODE_RESOURCE_SHARE}
    return options


def _start(
    dispatchers: Sequence[Any], config: RewardPoolConfig, placement_timeout_s: float, on_wait: Callable[[], None]
) -> dict[str, int]:
    started = [dispatcher.start.remote(placement_timeout_s) for dispatcher in dispatchers]
    while ray.wait(started, num_returns=len(started), timeout=1.0)[1]:
        on_wait()
    try:
        controls: dict[str, int] = ray.get(started)[0]
        return controls
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, CtrlRayError):
            raise type(cause)(str(cause)) from None
        if isinstance(cause, TimeoutError):
            raise ResourceError(
                f"{_resources(config)}; {cause}. Where there is no room for them, lower rewards.num_actors or "
                "rewards.cpus_per_actor, or give the cluster more; where there is, its machines are too busy to start a "
                "process in that time"
            ) from None
        raise RewardError(f"the reward pool did not start: {type(cause).__name__}: {cause}") from None
    except RayActorError as error:
        raise RewardError(f"the reward pool did not start: {error}") from None


def _resources(config: RewardPoolConfig) -> str:
    def shown(resources: Mapping[str, float]) -> str:
        named = (
            f" and {resources.get(config.node_resource, 0):g} {config.node_resource}" if config.node_resource else ""
        )
        return f"{counted(resources.get('CPU', 0), 'CPU')} and {counted(resources.get('GPU', 0), 'GPU')}{named}"

    return (
        f"the reward pool asks for {counted(config.num_actors, 'actor')} with {counted(config.cpus_per_actor, 'CPU')} and "
        f"{counted(config.fixed_gpus_per_actor, 'GPU')} each; the cluster has {shown(ray.cluster_resources())}, of which "
        f"{shown(ray.available_resources())} are free"
    )


def _stop(dispatchers: Sequence[Any]) -> None:
    """End the actors, then their owners; where one does not answer, Ray ends them with it."""
    if not ray.is_initialized():
        return
    ray.wait([dispatcher.stop.remote() for dispatcher in dispatchers], num_returns=len(dispatchers), timeout=10.0)
    for dispatcher in dispatchers:
        ray.kill(dispatcher, no_restart=True)
