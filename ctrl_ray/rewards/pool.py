"""The reward pool: Ray actors that hold the decoder and the classifiers, and the client that training workers ask."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, ActorUnschedulableError, RayActorError, RayError, RayTaskError
from torch import Tensor

from ctrl_ray.config import RewardPoolConfig
from ctrl_ray.errors import ConfigError, CtrlRayError, ResourceError, RewardError
from ctrl_ray.rewards.analytic import AnalyticRewardModel
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.model import RewardModel, RewardModelSpec, load_reward_model

logger = logging.getLogger(__name__)


class RewardActor:
    """One process of the pool. Every call is one forward (and backward) of its own, independent of other calls."""

    def __init__(self, spec: RewardModelSpec, model: RewardModel | AnalyticRewardModel | None = None) -> None:
        if spec.threads is not None:
            torch.set_num_threads(spec.threads)
        if model is not None:
            model.chunk_size = spec.decode_chunk_size
        self._spec = spec
        self._model = model

    def ping(self) -> None:
        """Answer as soon as the process runs."""

    def process_id(self) -> int:
        """Process id on the actor's node, for logs."""
        return os.getpid()

    def load(self) -> dict[str, int]:
        """Load the model if it is not yet; number of classes of each control."""
        if self._model is None:
            self._model = load_reward_model(self._spec)
        return self._model.to(self._spec.device).controls

    def evaluate(
        self, latents: np.ndarray, prompts: Sequence[str], labels: np.ndarray, weights: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """(log_probs, cotangent) of `RewardModel.evaluate`, as arrays."""
        answer = self._loaded().evaluate(_tensor(latents), prompts, _tensor(labels), _tensor(weights))
        assert answer.cotangent is not None
        return answer.log_probs.numpy(), answer.cotangent.numpy()

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """`RewardModel.decode`, as an array."""
        return self._loaded().decode(_tensor(latents)).numpy()

    def class_log_probs(self, inputs: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """`RewardModel.class_log_probs`, as arrays."""
        answers = self._loaded().class_log_probs(_tensor(inputs), prompts)
        return {name: values.numpy() for name, values in answers.items()}

    def _loaded(self) -> RewardModel | AnalyticRewardModel:
        self.load()
        assert self._model is not None
        return self._model


class RewardPool:
    """The actors, owned by the driver; a context manager whose end stops them. Workers get `client()`."""

    def __init__(
        self, actors: Sequence[Any], config: RewardPoolConfig, controls: dict[str, int], given_model: Any = None
    ) -> None:
        self.actors = tuple(actors)
        self.config = config
        self.controls = controls
        self._given_model = given_model  # a restarted actor reads it again: it must stay in the object store

    def client(self) -> PooledRewards:
        """A picklable handle on the pool, to be sent to training workers."""
        return PooledRewards(
            self.actors, self.controls, timeout_s=self.config.timeout_s, chunk_size=self.config.decode_chunk_size
        )

    def shutdown(self) -> None:
        """Stop every actor; a request still under way fails with a RewardError. Safe to call twice."""
        _kill(self.actors)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.shutdown()


def start_reward_pool(
    spec: RewardModelSpec,
    config: RewardPoolConfig,
    *,
    model: RewardModel | AnalyticRewardModel | None = None,
    placement_timeout_s: float = 300.0,
    max_restarts: int = -1,
    actor_options: Mapping[str, Any] | None = None,
) -> RewardPool:
    """Start `config.num_actors` actors on the connected cluster and wait until each has loaded the model of `spec`.

    The config decides an actor's device, threads and chunk size, whatever the spec says. `model` is a reward model
    (on the CPU) that the actors use instead of loading one; `max_restarts` is how often Ray restarts a lost actor
    (-1: always); `actor_options` goes to Ray (`scheduling_strategy`, `resources`, `runtime_env`, ...). Raises
    ResourceError when the actors have not started within `placement_timeout_s`, ModelError when the model cannot be
    loaded, RewardError when an actor dies while loading or takes longer than `config.timeout_s`.
    """
    if config.num_actors < 1:
        raise ConfigError(
            f"rewards.num_actors is {config.num_actors}; a pool needs at least 1 (0 means LocalRewards in each worker)"
        )
    spec = dataclasses.replace(
        spec,
        device="cuda" if config.gpus_per_actor > 0 else "cpu",
        threads=config.threads_per_actor or max(1, math.ceil(config.cpus_per_actor)),
        decode_chunk_size=config.decode_chunk_size,
    )
    options = {
        "num_cpus": config.cpus_per_actor,
        "num_gpus": config.gpus_per_actor,
        "max_restarts": max_restarts,
        **(actor_options or {}),
    }
    remote_class = ray.remote(RewardActor).options(**options)
    given_model = None if model is None else ray.put(model)
    actors = [remote_class.remote(spec, given_model) for _ in range(config.num_actors)]
    try:
        _wait_until_placed(actors, config, placement_timeout_s)
        controls = _wait_until_loaded(actors, config)
    except BaseException:
        _kill(actors)
        raise
    return RewardPool(actors, config, controls, given_model)


def _wait_until_placed(actors: Sequence[Any], config: RewardPoolConfig, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    waiting = [actor.ping.remote() for actor in actors]
    while waiting:
        left_s = deadline - time.monotonic()
        placed, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=max(0.0, min(15.0, left_s)))
        try:
            ray.get(placed)
        except ActorUnschedulableError as error:
            raise ResourceError(f"{_resources(config)}; Ray cannot place them: {_first_line(error)}") from None
        except RayError as error:
            raise RewardError(f"a reward actor did not start: {_first_line(error)}") from None
        if waiting and left_s <= 0:
            raise ResourceError(
                f"{_resources(config)}; {len(waiting)} of them did not start within {timeout_s:g} s. Where "
                "there is no room for them, lower rewards.num_actors or rewards.cpus_per_actor, or give the cluster more; "
                "where there is, its machines are too busy to start a process in that time"
            )
        if waiting:
            logger.info("%d of %d reward actors wait for room", len(waiting), len(actors))


def _wait_until_loaded(actors: Sequence[Any], config: RewardPoolConfig) -> dict[str, int]:
    loading = [actor.load.remote() for actor in actors]
    _, late = ray.wait(loading, num_returns=len(loading), timeout=config.timeout_s)
    if late:
        raise RewardError(
            f"{len(late)} of {len(actors)} reward actors did not load their model within rewards.timeout_s = "
            f"{config.timeout_s:g} s; raise it, or download the base model first"
        )
    try:
        return dict(ray.get(loading)[0])
    except RayTaskError as error:
        cause = error.cause
        if isinstance(cause, CtrlRayError):
            raise type(cause)(str(cause)) from None
        raise RewardError(f"a reward actor could not load its model: {type(cause).__name__}: {cause}") from None
    except (RayActorError, ActorDiedError) as error:
        raise RewardError(f"a reward actor died while it loaded its model: {_first_line(error)}") from None


def _resources(config: RewardPoolConfig) -> str:
    def shown(resources: Mapping[str, float]) -> str:
        return f"{resources.get('CPU', 0):g} CPUs and {resources.get('GPU', 0):g} GPUs"

    return (
        f"the reward pool asks for {config.num_actors} actors with {config.cpus_per_actor:g} CPUs and "
        f"{config.gpus_per_actor:g} GPUs each; the cluster has {shown(ray.cluster_resources())}, of which "
        f"{shown(ray.available_resources())} are free"
    )


def _kill(actors: Sequence[Any]) -> None:
    if not ray.is_initialized():
        return
    for actor in actors:
        ray.kill(actor, no_restart=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())  # what Ray hands over is read-only shared memory
