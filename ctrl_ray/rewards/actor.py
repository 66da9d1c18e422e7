"""One process of the reward pool. What needs torch is imported in that process, not by whoever starts it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray import cloudpickle

from ctrl_ray.collector import collect_seldom_in_workers
from ctrl_ray.errors import naming_memory

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ctrl_ray.rewards.analytic import AnalyticRewardModel
    from ctrl_ray.rewards.model import RewardModel
    from ctrl_ray.rewards.spec import RewardModelSpec

METHODS = ("evaluate", "decode", "class_log_probs")
"""What a request may ask for."""


class RewardActor:
    """Holds the decoder and the classifiers; a call is one forward (and backward), independent of earlier calls."""

    def __init__(self, given: bytes) -> None:
        """given: (RewardModelSpec, a model to use instead of loading it or None), pickled by the driver so that the
        pool's dispatcher can pass it on unread."""
        collect_seldom_in_workers()
        import torch

        from ctrl_ray.policy.precision import set_float32_precision

        self._spec: RewardModelSpec
        self._model: RewardModel | AnalyticRewardModel | None
        self._spec, self._model = cloudpickle.loads(given)
        set_float32_precision(self._spec.precision)
        if self._spec.threads is not None:
            torch.set_num_threads(self._spec.threads)
        if self._model is not None:
            self._model.chunk_size = self._spec.decode_chunk_size

    def where(self) -> tuple[int, str]:
        """Process id and Ray's id of its node; answers as soon as the process runs."""
        return os.getpid(), ray.get_runtime_context().get_node_id()

    def load(self) -> dict[str, int]:
        """Load the model if it is not yet; number of classes of each control."""
        with naming_memory("a reward actor loads its model"):
            if self._model is None:
                from ctrl_ray.rewards.model import load_reward_model

                self._model = load_reward_model(self._spec)
            return self._model.to(self._spec.device).controls

    def answer(self, method: str, *requests: tuple[Any, ...]) -> tuple[Any, ...]:
        """Seconds that it took, then the answer to each request (the arguments of `method`, as arrays).

        Several requests for evaluate share one forward pass.
        """
        assert method in METHODS and (len(requests) == 1 or method == "evaluate"), (method, len(requests))
        start, samples = time.perf_counter(), sum(len(request[0]) for request in requests)
        with naming_memory(
            f"a reward actor answers {method} for {samples} samples, {self._spec.decode_chunk_size} at a time"
        ):
            answers = self._evaluate(requests) if method == "evaluate" else [getattr(self, f"_{method}")(*requests[0])]
        return time.perf_counter() - start, *answers

    def _evaluate(self, requests: Sequence[tuple[Any, ...]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(log_probs, cotangent) of `RewardModel.evaluate` for each request."""
        import torch

        latents, prompts, labels, weights = zip(*requests, strict=True)
        answer = self._loaded().evaluate(
            torch.cat([_tensor(x) for x in latents]),
            [prompt for theirs in prompts for prompt in theirs],
            torch.cat([_tensor(x) for x in labels]),
            torch.cat([_tensor(x) for x in weights]),
        )
        assert answer.cotangent is not None
        sizes = [len(x) for x in latents]
        return [
            (log_probs.numpy(), cotangent.numpy())
            for log_probs, cotangent in zip(answer.log_probs.split(sizes), answer.cotangent.split(sizes), strict=True)
        ]

    def _decode(self, latents: np.ndarray) -> np.ndarray:
        """`RewardModel.decode`, as an array."""
        return self._loaded().decode(_tensor(latents)).numpy()

    def _class_log_probs(self, inputs: np.ndarray, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """`RewardModel.class_log_probs`, as arrays."""
        answers = self._loaded().class_log_probs(_tensor(inputs), prompts)
        return {name: values.numpy() for name, values in answers.items()}

    def _loaded(self) -> RewardModel | AnalyticRewardModel:
        assert self._model is not None, "an actor gets requests only after it has loaded its model"
        return self._model


def _tensor(array: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(array.copy())  # what Ray hands over is read-only shared memory
