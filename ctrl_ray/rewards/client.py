"""What a training worker holds of the reward pool: asynchronous requests, a bounded number of them at a time."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, ObjectLostError, RayActorError, RayTaskError
from torch import Tensor

from ctrl_ray.errors import CtrlRayError, RewardError
from ctrl_ray.rewards.protocol import RewardAnswer

_MAX_RETRIES = 3
"""Times that a request is sent to the pool again because its answer was lost on the way (with the node that held it)."""


class PooledRewards:
    """The reward protocol through a pool of Ray actors; picklable (handles and numbers only).

    At most `max_pending` requests are unanswered at a time: `submit` then waits for one of them. It also moves answers
    that have come into this process's memory, so that the object store never holds more than `max_pending` requests and
    answers of one client.
    """

    differentiable = True

    def __init__(
        self,
        dispatchers: Sequence[Any],
        controls: dict[str, int],
        *,
        timeout_s: float,
        chunk_size: int,
        max_pending: int,
        rank: int = 0,
    ) -> None:
        """dispatchers: handles of the pool's `RewardDispatcher`s; rank: of the worker that asks, which decides which of them
        it asks; the others as in `RewardPoolConfig`."""
        self.controls = dict(controls)
        self._dispatchers, self._rank = tuple(dispatchers), rank
        self._dispatcher = self._dispatchers[rank % len(self._dispatchers)]
        self._timeout_s, self._chunk_size, self._max_pending = timeout_s, chunk_size, max_pending
        # The calls are held weakly: an answer that nobody waits for leaves the object store.
        self._calls: dict[Any, weakref.ref[_Call]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        settings = {
            "timeout_s": self._timeout_s,
            "chunk_size": self._chunk_size,
            "max_pending": self._max_pending,
            "rank": self._rank,
        }
        return _rebuild, (self._dispatchers, self.controls, settings)

    def for_worker(self, rank: int) -> PooledRewards:
        """The same pool for one more worker, with a bound of its own. Each dispatcher serves its workers in the order of their
        requests, whatever their rank."""
        rebuild, (dispatchers, controls, settings) = self.__reduce__()
        return rebuild(dispatchers, controls, settings | {"rank": rank})

    def submit(self, latents: Tensor, prompts: Sequence[str], labels: Tensor, weights: Tensor) -> PooledPendingRewards:
        """Send one request (shapes as in `RewardModel.evaluate`) and return at once, unless too many are unanswered.

        Errors of the evaluation are raised by the `result` of what it returns.
        """
        arguments = (_array(latents), tuple(prompts), _array(labels), _array(weights))
        return PooledPendingRewards(self._call("evaluate", arguments, len(latents)), latents.device)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8, decoded by the dispatcher's actors in turn."""
        calls = [self._call("decode", (_array(part),), len(part)) for part in latents.split(self._chunk_size)]
        return torch.cat([torch.from_numpy(call.result(None)) for call in calls])

    def class_log_probs(self, inputs: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `RewardModel.class_log_probs`; the batch is spread over the dispatcher's actors."""
        if len(prompts) != len(inputs):
            raise RewardError(f"{len(inputs)} samples came with {len(prompts)} prompts; expected one for each")
        calls = []
        for start in range(0, len(inputs), self._chunk_size):
            part = inputs[start : start + self._chunk_size]
            theirs = tuple(prompts[start : start + self._chunk_size])
            calls.append(self._call("class_log_probs", (_array(part), theirs), len(part)))
        answers = [call.result(None) for call in calls]
        return {
            name: torch.from_numpy(np.concatenate([answer[name] for answer in answers])).to(inputs.device)
            for name in self.controls
        }

    def _call(self, method: str, arguments: tuple[Any, ...], num_samples: int) -> _Call:
        while len(self._unanswered()) >= self._max_pending:
            self._wait(list(self._calls), None)
        return _Call(self, method, arguments, num_samples)

    def _unanswered(self) -> dict[Any, weakref.ref[_Call]]:
        """Calls under way by their token, also those that nobody waits for; takes in the answers of the others."""
        if self._calls:
            for token in ray.wait(list(self._calls), num_returns=len(self._calls), timeout=0)[0]:
                call = self._calls.pop(token)()
                if call is not None:
                    call.take_in()
        return self._calls

    def _wait(self, tokens: list[Any], deadline: float | None) -> bool:
        """Wait until one of the calls has ended, or the deadline (monotonic) has passed; whether one has ended.

        Without a deadline for as long as the pool's dispatcher is alive: it ends every call, with an answer or an error.
        """
        while True:
            patience_s = self._timeout_s if deadline is None else max(0.0, deadline - time.monotonic())
            if ray.wait(tokens, timeout=patience_s)[0]:
                return True
            if deadline is not None:
                return False
            if not ray.wait([self._dispatcher.stats.remote()], timeout=self._timeout_s)[0]:
                raise RewardError(
                    f"the dispatcher of the reward pool has not answered for {self._timeout_s:g} s; look at the driver's "
                    "node, then restart the run with --resume"
                )


class PooledPendingRewards:
    """A request to the pool under way."""

    def __init__(self, call: _Call, device: torch.device) -> None:
        self._call = call
        self._device = device
        self._rewarded: RewardAnswer | None = None

    def result(self, timeout_s: float | None = None) -> RewardAnswer:
        """Wait at most `timeout_s` for the one answer; asking again gives the same one.

        None: for as long as it takes, which is bounded: the pool gives an actor rewards.timeout_s for a request, sends
        it to another one when that time is over or the actor is lost, MAX_RETRIES times at most, and has no actor for
        rewards.timeout_s at most. Raises RewardError when the pool gives up or time is over, or with the message of
        the evaluation's own error; ConfigError when that was one.
        """
        if self._rewarded is None:
            log_probs, cotangent = self._call.result(timeout_s)
            self._rewarded = RewardAnswer(*(torch.from_numpy(x).to(self._device) for x in (log_probs, cotangent)))
        return self._rewarded


class _Call:
    """One request under way, from its arguments in the object store to its answer in this process. It has no side
    effects, so that it may be made again."""

    def __init__(self, client: PooledRewards, method: str, arguments: tuple[Any, ...], num_samples: int) -> None:
        self._client, self._method, self._num_samples = client, method, num_samples
        self._payload: Any = ray.put(arguments)
        self._losses = 0
        self._value: Any = None
        self._error: CtrlRayError | None = None
        self._send()

    def _send(self) -> None:
        submit = self._client._dispatcher.submit.options(num_returns=2)
        # The token tells that the call has ended, and may be kept without keeping the answer.
        self._token, self._answer = submit.remote(self._method, [self._payload], self._num_samples)
        self._client._calls[self._token] = weakref.ref(self)

    def result(self, timeout_s: float | None) -> Any:
        """The method's value; errors as in `PooledPendingRewards.result`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while self._value is None and self._error is None:
            if not self._client._wait([self._token], deadline):
                raise RewardError(
                    f"the reward pool gave no answer within {timeout_s:g} s; it may only be slow: give it more with "
                    "rewards.num_actors, rewards.cpus_per_actor or rewards.gpus_per_actor"
                )
            self._client._calls.pop(self._token, None)
            self.take_in()
        if self._error is not None:
            raise self._error
        return self._value

    def take_in(self) -> None:
        """Copy the answer (or the error) of the call, which has ended, out of the object store; or send it again."""
        if self._value is not None or self._error is not None:
            return
        try:
            (answer,) = ray.get(self._answer)
            self._value = _copy(ray.get(answer))
        except RayTaskError as error:
            self._error = _own_error(error)
        except ActorDiedError as error:
            self._error = RewardError(f"the reward pool was stopped ({_first_line(error)})")
        except (RayActorError, ObjectLostError) as error:
            self._losses += 1
            if self._losses <= _MAX_RETRIES:
                self._send()
                return
            self._error = RewardError(f"the answer of a reward request was lost {self._losses} times: {error}")
        self._answer = self._payload = None


def _rebuild(dispatchers: Sequence[Any], controls: dict[str, int], settings: dict[str, Any]) -> PooledRewards:
    return PooledRewards(dispatchers, controls, **settings)


def _own_error(error: RayTaskError) -> CtrlRayError:
    """The pool's error as it would be raised in this process, without Ray's remote traceback."""
    cause = error.cause
    if isinstance(cause, CtrlRayError):
        return type(cause)(str(cause))
    return RewardError(f"the reward pool failed: {type(cause).__name__}: {cause}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _array(tensor: Tensor) -> np.ndarray:
    """What is sent: float32 for floats, the integers as they are."""
    tensor = tensor.detach().cpu()
    return np.ascontiguousarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())


def _copy(value: Any) -> Any:
    """The same arrays in this process's own memory."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    return tuple(map(_copy, value))
