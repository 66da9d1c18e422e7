"""What a training worker holds of the reward pool: asynchronous requests that survive the loss of an actor."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayActorError, RayTaskError
from torch import Tensor

from ctrl_ray.errors import CtrlRayError, RewardError
from ctrl_ray.rewards.protocol import Rewarded

MAX_RETRIES = 3
"""Times that one request is sent again after the actor that had it was lost; more would let a request that kills its
actor (out of memory) take the whole pool down."""


class PooledRewards:
    """The reward protocol through a pool of Ray actors; picklable (actor handles and numbers only).

    A request goes to the actor with the fewest unfinished requests of this client; ties go to the first actor from
    `first_actor` on. At most `max_outstanding` requests are unfinished at a time: `submit` then waits for the oldest.
    """

    differentiable = True

    def __init__(
        self,
        actors: Sequence[Any],
        controls: dict[str, int],
        *,
        timeout_s: float,
        chunk_size: int,
        max_outstanding: int | None = None,
        first_actor: int = 0,
    ) -> None:
        self.controls = dict(controls)
        self._settings = {"timeout_s": timeout_s, "chunk_size": chunk_size, "max_outstanding": max_outstanding}
        self._actors = tuple(actors)
        self._first_actor = first_actor % len(self._actors)
        self._timeout_s = timeout_s
        self._chunk_size = chunk_size
        self._max_outstanding = max_outstanding or 2 * len(self._actors) + 2
        self._calls: list[weakref.ref[_Call]] = []  # weak: an answer that nobody waits for leaves the object store

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._actors, self.controls, self._settings, self._first_actor)

    def for_worker(self, rank: int) -> PooledRewards:
        """The same pool, asked from actor `rank` on, so that workers do not all begin at the same actor."""
        return _rebuild(self._actors, self.controls, self._settings, rank)

    def submit(self, latents: Tensor, prompts: Sequence[str], labels: Tensor, weights: Tensor) -> PooledPendingRewards:
        """Send one request (shapes as in `RewardModel.evaluate`) and return at once, unless too many are unfinished.

        Errors of the evaluation are raised by the `result` of what it returns.
        """
        arguments = (_array(latents), tuple(prompts), _array(labels), _array(weights))
        return PooledPendingRewards(self._call("evaluate", arguments), latents.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8, decoded by all actors in turn."""
        parts = latents.split(self._chunk_size)
        calls = [self._call("decode", (_array(part),)) for part in parts]
        return torch.cat([torch.from_numpy(call.result(None).copy()) for call in calls])

    def class_log_probs(self, inputs: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `RewardModel.class_log_probs`; the batch is spread over all actors."""
        if len(prompts) != len(inputs):
            raise RewardError(f"{len(inputs)} samples came with {len(prompts)} prompts; expected one for each")
        size = self._chunk_size
        calls = [
            self._call("class_log_probs", (_array(inputs[start : start + size]), tuple(prompts[start : start + size])))
            for start in range(0, len(inputs), size)
        ]
        answers = [call.result(None) for call in calls]
        return {
            name: torch.from_numpy(np.concatenate([answer[name] for answer in answers])).to(inputs.device)
            for name in self.controls
        }

    def _call(self, method: str, arguments: tuple[Any, ...]) -> _Call:
        unfinished = self._unfinished()
        while len(unfinished) >= self._max_outstanding:
            oldest = unfinished[0]
            done, _ = ray.wait([oldest.ref], timeout=self._timeout_s)
            if not done:
                raise oldest.timeout_error(self._timeout_s)
            unfinished = self._unfinished()
        call = _Call(self, method, arguments)
        self._calls.append(weakref.ref(call))
        return call

    def _unfinished(self) -> list[_Call]:
        """Calls that still run, oldest first; forgets the others."""
        calls = [call for reference in self._calls if (call := reference()) is not None and call.ref is not None]
        if calls:
            refs = [call.ref for call in calls]
            running = set(ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False)[1])
            calls = [call for call in calls if call.ref in running]
        self._calls = [weakref.ref(call) for call in calls]
        return calls

    def _choose_actor(self, lost: set[int]) -> int | None:
        """The least busy actor that is not among the lost ones, if there is one left."""
        load = [0] * len(self._actors)
        for call in self._unfinished():
            load[call.actor_index] += 1
        in_turn = [(self._first_actor + step) % len(load) for step in range(len(load))]
        return min((index for index in in_turn if index not in lost), key=load.__getitem__, default=None)


class PooledPendingRewards:
    """A request to the pool under way."""

    def __init__(self, call: _Call, device: torch.device) -> None:
        self._call = call
        self._device = device
        self._rewarded: Rewarded | None = None

    def result(self, timeout_s: float | None = None) -> Rewarded:
        """Wait at most `timeout_s` (None: rewards.timeout_s) for the one answer; asking again gives the same one.

        A lost actor's request is sent to another actor, or to the same one after its restart, at most MAX_RETRIES
        times. Raises RewardError after the timeout, when no actor is left, or with the message of the actor's own
        error; ConfigError when that was one.
        """
        if self._rewarded is None:
            log_probs, cotangent = self._call.result(timeout_s)
            self._rewarded = Rewarded(*(torch.from_numpy(x.copy()).to(self._device) for x in (log_probs, cotangent)))
            self._call.release()
        return self._rewarded


class _Call:
    """One method call on one actor, repeated on another when the actor is lost. Calls have no side effects."""

    def __init__(self, client: PooledRewards, method: str, arguments: tuple[Any, ...]) -> None:
        self.client = client
        self.method = method
        self.arguments = arguments
        self.ref: Any = None
        index = client._choose_actor(set())
        assert index is not None
        self._send(index)

    def _send(self, actor_index: int) -> None:
        self.actor_index = actor_index
        self.ref = getattr(self.client._actors[actor_index], self.method).remote(*self.arguments)

    def release(self) -> None:
        """Drop the answer in the object store and the arguments."""
        self.ref = None
        self.arguments = ()

    def result(self, timeout_s: float | None) -> Any:
        """The method's value, valid as long as this call is; errors as in `PooledPendingRewards.result`."""
        timeout_s = self.client._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        for retry in range(MAX_RETRIES + 1):
            done, _ = ray.wait([self.ref], timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                raise self.timeout_error(timeout_s)
            try:
                return ray.get(self.ref)
            except RayTaskError as error:
                raise _own_error(error, self.actor_index) from None
            except (RayActorError, ObjectLostError) as error:
                if retry == MAX_RETRIES:
                    raise RewardError(
                        f"a reward request was lost {MAX_RETRIES + 1} times, last with reward actor "
                        f"{self.actor_index}: {_first_line(error)}; if actors run out of memory, lower "
                        "micro_batch_size_per_worker or rewards.decode_chunk_size"
                    ) from None
                self._send(self._find_live_actor(deadline, timeout_s))
        raise AssertionError("unreachable: the last retry returns or raises")

    def timeout_error(self, timeout_s: float) -> RewardError:
        """What to say when the answer is not there in time."""
        others = len(self.client._unfinished()) - 1
        return RewardError(
            f"reward actor {self.actor_index} of {len(self.client._actors)} gave no answer within {timeout_s:g} s "
            f"({others} other requests of this worker are unfinished); raise rewards.timeout_s, or give the pool more "
            "with rewards.num_actors, rewards.cpus_per_actor or rewards.gpus_per_actor"
        )

    def _find_live_actor(self, deadline: float, timeout_s: float) -> int:
        """An actor that answers a ping, the one that was just lost last; waits for restarts until the deadline."""
        lost, dead = {self.actor_index}, set[int]()
        last = "actor lost"
        while len(dead) < len(self.client._actors):
            index = self.client._choose_actor(lost | dead)
            if index is None:
                lost = set()
                time.sleep(0.1)
                continue
            ping = self.client._actors[index].ping.remote()
            if not ray.wait([ping], timeout=max(0.0, deadline - time.monotonic()))[0]:
                raise self.timeout_error(timeout_s)
            try:
                ray.get(ping)
                return index
            except ActorUnavailableError:
                lost.add(index)
            except RayActorError as error:
                dead.add(index)
                last = _first_line(error)
            if time.monotonic() > deadline:
                raise self.timeout_error(timeout_s)
        raise RewardError(f"all {len(dead)} reward actors are dead ({last}); restart the run with --resume")


def _rebuild(actors: Sequence[Any], controls: dict[str, int], settings: dict[str, Any], rank: int) -> PooledRewards:
    return PooledRewards(actors, controls, first_actor=rank, **settings)


def _own_error(error: RayTaskError, actor_index: int) -> CtrlRayError:
    """The error of the evaluation as it would be raised in this process, without Ray's remote traceback."""
    cause = error.cause
    if isinstance(cause, CtrlRayError):
        return type(cause)(str(cause))
    return RewardError(f"reward actor {actor_index} failed: {type(cause).__name__}: {cause}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _array(tensor: Tensor) -> np.ndarray:
    """What is sent: float32 for floats, the integers as they are."""
    tensor = tensor.detach().cpu()
    return np.ascontiguousarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())
