"""While a run waits for machines: what it asks for, what is there, what is missing, what the autoscaler does about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import ray
from ray.util import placement_group_table

from ctrl_ray.cluster.autoscaler import Activity, activity
from ctrl_ray.config import TrainConfig
from ctrl_ray.errors import ResourceError
from ctrl_ray.ray_internals import actor_waits_for_process
from ctrl_ray.wording import duration

_LOOK_EVERY_S = 2.0


class ClusterWait:
    """Tells people why nothing happens, and ends a wait that takes too long; poll it while a run may be waiting.

    Args:
        asked: CPUs and GPUs that the run asks for, for the message.
        placement_timeout_s: The longest wait.
        say: Gets the lines.
        waits: Whether something of the run waits for resources now; None: `group_waits`.
        patience_s: Seconds before the first message about a wait.
        every_s: Seconds between two lines of one wait.
    """

    def __init__(
        self,
        asked: Mapping[str, float],
        placement_timeout_s: float,
        say: Callable[[str], None],
        *,
        waits: Callable[[], bool] | None = None,
        patience_s: float = 8.0,
        every_s: float = 30.0,
    ) -> None:
        self._asked, self._placement_timeout_s = asked, placement_timeout_s
        self._say, self._waits = say, waits or group_waits
        self._patience_s, self._every_s = patience_s, every_s
        self._since: float | None = None
        self._last_look = self._last_said = 0.0

    @property
    def waiting(self) -> bool:
        """Whether there was no room at the last look."""
        return self._since is not None

    def poll(self) -> None:
        """Cheap to call often. Raises ResourceError when a wait has lasted `scaling.placement_timeout_s`."""
        now = time.monotonic()
        if now - self._last_look < _LOOK_EVERY_S:
            return
        self._last_look = now
        if not self._waits():
            self._since = None
            return
        if self._since is None:
            self._since, self._last_said = now, 0.0
        waited = now - self._since
        if waited > self._placement_timeout_s:
            raise ResourceError(
                f"{self._facts(waited)}. That is longer than scaling.placement_timeout_s "
                f"({self._placement_timeout_s:g}), so the run ends instead of paying for what is there; give the same command "
                "again once there is room (with --resume where the output folder is still there), or ask for less"
            )
        if waited >= self._patience_s and now - self._last_said >= self._every_s:
            self._last_said = now
            self._say(self._facts(waited))

    def _facts(self, waited: float) -> str:
        nodes = sum(bool(node["Alive"]) for node in ray.nodes())
        return waiting_line(
            duration(waited),
            self._asked,
            nodes,
            ray.cluster_resources(),
            ray.available_resources(),
            activity(),
        )


def waiting_line(
    waited: str,
    needed: Mapping[str, float],
    num_nodes: int,
    total: Mapping[str, float],
    free: Mapping[str, float],
    doing: Activity,
) -> str:
    """'waiting for machines (40 s): the run asks for 4 CPUs, 2 GPUs; there: 1 node with 8 CPUs (6 free), 0 GPUs; ...'."""
    kinds = [kind for kind, amount in needed.items() if amount > 0]
    asked = ", ".join(f"{needed[kind]:g} {kind}s" for kind in kinds)
    there = ", ".join(f"{total.get(kind, 0.0):g} {kind}s ({free.get(kind, 0.0):g} free)" for kind in kinds)
    lacking = ", ".join(
        f"{needed[kind] - total.get(kind, 0.0):g} {kind}s"
        for kind in kinds
        if needed[kind] > total.get(kind, 0.0) + 1e-9
    )
    line = (
        f"waiting for machines ({waited}): the run asks for {asked}; there: {num_nodes} node{'s' * (num_nodes != 1)} with "
        f"{there}; "
    )
    line += (
        f"missing: {lacking}" if lacking else "missing: nothing in sum, but others use it or no node has enough alone"
    )
    if doing.starting:
        line += "; starting: " + ", ".join(f"{count} × {name}" for name, count in sorted(doing.starting.items()))
    if doing.failed:
        line += "; could not be started: " + ", ".join(doing.failed)
    return line


def group_waits() -> bool:
    """Whether a worker group of this job has no room. Drivers of a sweep's trials, which take a share of the
    sweep's own node, wait for their turn and not for machines."""
    job = ray.get_runtime_context().get_job_id()
    return any(
        group.get("state") in ("PENDING", "RESCHEDULING")
        and str(group["placement_group_id"]).endswith(job)
        and not any(kind.startswith("node:") for bundle in group["bundles"].values() for kind in bundle)
        for group in placement_group_table().values()
    )


def pool_waits(config: TrainConfig) -> bool:
    """Whether an actor of this job has no process yet, and what is free is too little for one of the reward pool."""
    rewards, free = config.rewards, ray.available_resources()
    lacking = (
        free.get("CPU", 0.0) < rewards.cpus_per_actor
        or free.get("GPU", 0.0) < rewards.fixed_gpus_per_actor
        or (rewards.node_resource is not None and free.get(rewards.node_resource, 0.0) <= 0)
    )
    return lacking and actor_waits_for_process()
