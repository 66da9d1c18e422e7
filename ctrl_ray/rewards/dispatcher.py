"""The reward pool's dispatcher: one small actor that keeps the queue, knows every reward actor's load, and replaces,
adds and stops reward actors. (A run with very many workers has several, see `ctrl_ray.rewards.pool`.)

Why one process in the middle: sharing a forward between workers, first come first served over all of them, a pool that
grows with its queue, and repeating a lost request each need one place that sees all requests. It stays cheap because
only references pass through it: arguments lie in the object store of the worker that asks, answers in that of the actor,
and both travel directly between the two. An actor has up to two requests (one that it works on and one that waits for
it), so it does not idle while an answer is on its way. It runs on the driver's node, so that it adds no node whose loss
would end a run; should its process die, Ray starts it again, with new reward actors, and repeats the calls under way.

Everything here runs in one thread (asyncio), so that a method without `await` is atomic.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayActorError

from ctrl_ray.config import RewardPoolConfig
from ctrl_ray.errors import CtrlRayError, RewardError
from ctrl_ray.rewards.fleet import Fleet, Member, first_line, own_error
from ctrl_ray.rewards.queue import Request, RequestQueue
from ctrl_ray.rewards.reservation import Reservation
from ctrl_ray.rewards.scaling import Scaler
from ctrl_ray.rewards.telemetry import ActorStats, PoolStats, Telemetry

logger = logging.getLogger(__name__)

MAX_RETRIES = 3
"""Times that one request is sent again after the actor that worked on it was lost; more would let a request that kills
its actor (out of memory) take the whole pool down again and again."""

_TICK_S = 0.1


class RewardDispatcher:
    """See the module's docstring. `given` is what a `RewardActor` is made of, or a list of one reference to it."""

    def __init__(self, given: bytes | list[Any], config: RewardPoolConfig, options: dict[str, Any], name: str) -> None:
        self._config = config
        self._queue = RequestQueue(
            max_batch_size=config.max_batch_size,
            max_batch_delay_s=config.max_batch_delay_s,
            shared=not config.deterministic,
        )
        self._slots = 2 if config.deterministic else 1  # requests that wait for an idle actor can still share a forward
        self._scaler = Scaler(
            *config.actor_bounds, grow_after_s=config.grow_after_s, shrink_after_s=config.shrink_after_s
        )
        self._telemetry = Telemetry(name)
        self._fleet = Fleet(
            given if isinstance(given, bytes) else given[0],
            options,
            target=config.num_actors,
            timeout_s=config.timeout_s,
            on_ready=self._advance,
        )
        self._reservation = Reservation(f"ctrl_ray-rewards-{name}", options)
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = False
        self._alarm: asyncio.TimerHandle | None = None
        self._none_ready_since_s: float | None = None

    # what the driver and the workers call

    async def start(self, placement_timeout_s: float) -> dict[str, int]:
        """Start the actors and wait until each has loaded its model; number of classes of each control.

        Raises TimeoutError when not all are placed in time, else the error of loading.
        """
        actors = [self._fleet.create() for _ in range(self._fleet.target)]
        placed = await asyncio.gather(
            *(asyncio.wait_for(self._fleet.place(actor), placement_timeout_s) for actor in actors),
            return_exceptions=True,
        )
        late = sum(isinstance(error, asyncio.TimeoutError) for error in placed)
        if late:
            raise TimeoutError(f"{late} of them did not start within {placement_timeout_s:g} s")
        _raise_first(placed)
        loaded = await asyncio.gather(*(self._fleet.load(actor) for actor in actors), return_exceptions=True)
        _raise_first(loaded)
        self._run()
        assert isinstance(loaded[0], dict)
        return loaded[0]

    async def submit(self, method: str, payload: list[Any], num_samples: int) -> tuple[None, list[Any]]:
        """Queue a request whose arguments payload[0] refers to; (None, [reference to the answer]) when it is there."""
        self._run()
        request = Request(
            method=method,
            payload=payload.pop(),
            num_samples=num_samples,
            arrived_s=time.monotonic(),
            answer=asyncio.get_running_loop().create_future(),
        )
        self._queue.append(request)
        self._advance()
        return None, [await request.answer]

    async def stats(self) -> PoolStats:
        """The pool now."""
        actors = tuple(
            ActorStats(
                process_id=actor.process_id,
                node_id=actor.node_id,
                ready=actor.ready,
                in_flight=sum(map(len, actor.calls)),
            )
            for actor in self._fleet
        )
        return self._telemetry.snapshot(len(self._queue), actors)

    async def stop(self) -> None:
        """End all actors; requests under way fail."""
        self._fleet.target = 0
        self._reservation.hold(0)
        for actor in self._fleet:
            for request in [request for call in actor.calls for request in call]:
                self._fail(request, RewardError("the reward pool was stopped before it had answered"))
            self._fleet.discard(actor)
        for request in list(self._queue):
            self._queue.remove(request)
            self._fail(request, RewardError("the reward pool was stopped before it had answered"))

    # requests

    def _advance(self) -> None:
        """Send what can be sent; to be called whenever a request comes or an actor becomes free."""
        self._rescale()
        while actor := self._free_actor():
            batch, wait_s = self._queue.take(time.monotonic())
            if not batch:
                if wait_s > 0:
                    self._wake_after(wait_s)
                return
            self._spawn(self._send(actor, batch))

    def _free_actor(self) -> Member | None:
        """The least busy actor that takes another request; among equals the one that had none for longest."""
        free = (member for member in self._fleet.working if len(member.calls) < self._slots)
        return min(free, key=lambda member: (len(member.calls), member.last_sent_s), default=None)

    def _wake_after(self, seconds: float) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm = asyncio.get_running_loop().call_later(seconds, self._advance)

    def _send(self, actor: Member, batch: list[Request]) -> Any:
        """Give the actor a call now; the coroutine that is returned waits for its end."""
        now_s = time.monotonic()
        done, *answers = actor.handle.answer.options(num_returns=1 + len(batch)).remote(
            batch[0].method, *(request.payload for request in batch)
        )
        if not actor.calls:
            actor.busy_since_s = now_s
        actor.calls.append(batch)
        actor.last_sent_s = now_s
        return self._finish(actor, batch, done, answers)

    async def _finish(self, actor: Member, batch: list[Request], done: Any, answers: list[Any]) -> None:
        failure, seconds = None, 0.0
        try:
            seconds = await done
        except RayActorError as error:
            self._lose(actor, f"was lost: {first_line(error)}")
            return
        except Exception as error:
            failure = error
        if actor.lost:
            return  # it was given up before: its requests are with others
        actor.calls.remove(batch)
        actor.busy_since_s = time.monotonic()
        if failure is not None:
            self._refuse(batch, failure)
        else:
            self._telemetry.count(forwards=1, busy_s=seconds)
            for request, answer in zip(batch, answers, strict=True):
                self._telemetry.answered(request.num_samples, time.monotonic() - request.arrived_s)
                if not request.answer.done():  # else nobody waits for it
                    request.answer.set_result(answer)
        if actor.draining and not actor.calls:
            self._fleet.discard(actor)
        self._advance()

    def _refuse(self, batch: list[Request], error: Exception) -> None:
        """The evaluation failed; of a shared one only the request at fault shall."""
        if len(batch) == 1:
            self._fail(batch[0], own_error(error))
            return
        for request in reversed(batch):
            request.alone = True
            self._queue.put_back(request)

    def _fail(self, request: Request, error: CtrlRayError) -> None:
        if not request.answer.done():
            self._telemetry.count(failed=1)
            request.answer.set_exception(error)

    def _lose(self, actor: Member, reason: str, *, stuck: bool = False) -> None:
        """Replace an actor and give its requests to others. The one that it worked on may be what ended it, so its
        losses are counted."""
        if actor.lost:
            return
        logger.warning("the reward actor in %s %s; it is replaced", actor, reason)
        calls = actor.calls
        self._fleet.discard(actor)
        self._telemetry.count(replaced=1)
        others = bool(self._fleet.working)
        for call in reversed(calls):
            for request in reversed(call):
                if call is calls[0]:
                    request.losses += 1
                    request.alone = True
                if request.losses > MAX_RETRIES:
                    self._fail(request, _lost_too_often(actor, reason))
                elif stuck and not others and call is calls[0]:
                    self._fail(request, _no_answer(actor, self._config.timeout_s))
                else:
                    self._telemetry.count(resent=1)
                    self._queue.put_back(request)
        self._fleet.fill()
        self._advance()

    # actors

    def _run(self) -> None:
        if not self._running:
            self._running = True
            self._spawn(self._watch())

    async def _watch(self) -> None:
        """Everything that time alone brings about."""
        while True:
            now_s = time.monotonic()
            for actor in self._fleet:
                if actor.calls and now_s - actor.busy_since_s > self._config.timeout_s:
                    self._lose(actor, f"gave no answer within {self._config.timeout_s:g} s", stuck=True)
            self._fleet.fill()
            self._advance()
            self._reservation.hold(self._fleet.target)
            self._give_up_waiting(now_s)
            await self.stats()  # sets the gauges
            await asyncio.sleep(_TICK_S)

    def _give_up_waiting(self, now_s: float) -> None:
        """Fail requests for which there has been no actor for rewards.timeout_s."""
        if any(actor.ready for actor in self._fleet):
            self._none_ready_since_s = None
            return
        if self._none_ready_since_s is None:
            self._none_ready_since_s = now_s
        for request in list(self._queue):
            if now_s - max(request.arrived_s, self._none_ready_since_s) > self._config.timeout_s:
                self._queue.remove(request)
                self._fail(request, _none_left(self._config, self._fleet.last_failure))

    def _rescale(self) -> None:
        if not self._fleet.target:
            return  # stopped
        staying = self._fleet.staying
        unfinished = len(self._queue) + sum(len(call) for actor in staying for call in actor.calls)
        starting = sum(not actor.ready for actor in staying)
        change = self._scaler.decide(time.monotonic(), self._fleet.target, unfinished, starting=starting)
        self._fleet.target += change
        if change > 0:
            logger.info("%d requests for %d reward actors: one more starts", unfinished, len(staying))
            self._fleet.fill()
        elif len(staying) > self._fleet.target:
            self._fleet.drain_one()

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)  # the loop itself holds tasks weakly
        task.add_done_callback(self._tasks.discard)


def _raise_first(results: Sequence[object]) -> None:
    for result in results:
        if isinstance(result, Exception):
            raise own_error(result) from None


def _lost_too_often(actor: Member, reason: str) -> RewardError:
    return RewardError(
        f"a reward request was lost {MAX_RETRIES + 1} times, last when the reward actor in {actor} {reason}; if actors run "
        "out of memory, lower micro_batch_size_per_worker or rewards.decode_chunk_size"
    )


def _no_answer(actor: Member, timeout_s: float) -> RewardError:
    return RewardError(
        f"the reward actor in {actor} gave no answer within rewards.timeout_s = {timeout_s:g} s, and the pool has no other "
        "one; raise rewards.timeout_s, or give the pool more with rewards.num_actors, rewards.cpus_per_actor or "
        "rewards.gpus_per_actor"
    )


def _none_left(config: RewardPoolConfig, failure: str) -> RewardError:
    why = (
        f"the last one that was started failed: {failure}"
        if failure
        else "none could be placed, or none has started yet"
    )
    return RewardError(
        f"no reward actor has been alive for rewards.timeout_s = {config.timeout_s:g} s ({why}); look at the cluster's "
        "nodes, then restart the run with --resume"
    )
