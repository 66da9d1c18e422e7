"""The reward actors that the pool's dispatcher has: starting, replacing, draining and ending them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, RayActorError, RayTaskError

from ctrl_ray.errors import CtrlRayError, ResourceError, RewardError
from ctrl_ray.rewards.actor import RewardActor
from ctrl_ray.rewards.queue import Request

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 30.0
_PATIENCE_S = 60.0


@dataclass(eq=False, slots=True)
class Member:
    """A reward actor as the dispatcher sees it."""

    handle: Any
    process_id: int | None = None
    node_id: str | None = None
    ready: bool = False
    """It has loaded its model."""
    draining: bool = False
    """It finishes its requests and gets no others."""
    lost: bool = False
    """It was given up; what comes of its calls counts no more."""
    calls: list[list[Request]] = field(default_factory=list)
    """What it has, in the order in which it works on it."""
    busy_since_s: float = 0.0
    """When it began with the first of its calls."""
    last_sent_s: float = 0.0

    def __str__(self) -> str:
        return f"process {self.process_id} on node {str(self.node_id)[:8]}"


class Fleet:
    """A number of actors that is kept up, whatever becomes of them; one thread (asyncio)."""

    def __init__(
        self, given: Any, options: dict[str, Any], *, target: int, timeout_s: float, on_ready: Callable[[], None]
    ) -> None:
        """given, options: what an actor is made of, for the class and for Ray; target: how many; timeout_s: for one to
        load its model; on_ready: called when another one has."""
        self.target = target
        self.last_failure = ""
        """Why the last actor that did not start did not."""
        self._given, self._options, self._timeout_s, self._on_ready = given, options, timeout_s, on_ready
        self._members: list[Member] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._failures, self._no_start_before_s, self._told_no_room = 0, 0.0, False

    def __iter__(self) -> Iterator[Member]:
        return iter(tuple(self._members))

    @property
    def staying(self) -> list[Member]:
        """Those that answer or start, and are not to end."""
        return [member for member in self._members if not member.draining]

    @property
    def working(self) -> list[Member]:
        """Those that take requests."""
        return [member for member in self.staying if member.ready]

    def create(self) -> Member:
        """One more, which has yet to be placed and to load."""
        member = Member(ray.remote(RewardActor).options(**self._options).remote(self._given))
        self._members.append(member)
        return member

    async def place(self, member: Member) -> None:
        """Wait for room, however long it takes: an actor that waits makes Ray's autoscaler add a node."""
        where = asyncio.ensure_future(_await(member.handle.where.remote()))
        try:
            while not (await asyncio.wait([where], timeout=_PATIENCE_S))[0]:
                if not self._told_no_room:
                    self._told_no_room = True
                    logger.warning("a reward actor waits for room in the cluster; the others go on without it")
        finally:
            where.cancel()
        member.process_id, member.node_id = where.result()

    async def load(self, member: Member) -> dict[str, int]:
        """Have it load its model; number of classes of each control."""
        try:
            controls = await asyncio.wait_for(_await(member.handle.load.remote()), self._timeout_s)
        except asyncio.TimeoutError:
            raise RewardError(
                f"a reward actor did not load its model within rewards.timeout_s = {self._timeout_s:g} s; raise it, or "
                "download the base model first"
            ) from None
        member.ready = not member.lost
        return controls

    def fill(self) -> None:
        """Start actors up to the number wanted; after failures only now and then."""
        while len(self.staying) < self.target and time.monotonic() >= self._no_start_before_s:
            task = asyncio.get_running_loop().create_task(self._bring_up(self.create()))
            self._tasks.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(self._tasks.discard)

    def drain_one(self) -> None:
        """Let one end after its requests: one that has not started yet, else the least busy one."""
        member = min(self.staying, key=lambda m: (m.ready, len(m.calls)))
        member.draining = True
        if not member.calls:
            self.discard(member)

    def discard(self, member: Member) -> None:
        """End an actor's process, whatever it does."""
        member.lost, member.ready, member.calls = True, False, []
        self._members.remove(member)
        ray.kill(member.handle, no_restart=True)

    async def _bring_up(self, member: Member) -> None:
        try:
            await self.place(member)
            await self.load(member)
        except Exception as error:
            if member.lost:
                return  # it was stopped while it started
            self.discard(member)
            self._failures += 1
            self.last_failure = str(own_error(error))
            pause_s = min(_LONGEST_PAUSE_S, 0.5 * 2**self._failures)
            self._no_start_before_s = time.monotonic() + pause_s
            logger.warning("a reward actor did not start (%s); next try in %g s", self.last_failure, pause_s)
            return
        self._failures, self._told_no_room = 0, False
        self._on_ready()


def own_error(error: Exception) -> CtrlRayError:
    """An error of an actor as it would be raised in this process, without Ray's remote traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, CtrlRayError):
        return type(cause)(str(cause))
    if isinstance(error, ActorUnschedulableError):
        return ResourceError(f"Ray cannot place a reward actor: {first_line(error)}")
    if isinstance(error, RayActorError):
        return RewardError(f"a reward actor died while it started: {first_line(error)}")
    return RewardError(f"a reward actor failed: {type(cause).__name__}: {first_line(cause)}")


def first_line(error: BaseException) -> str:
    """The first line of its message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


async def _await(reference: Any) -> Any:
    return await reference
