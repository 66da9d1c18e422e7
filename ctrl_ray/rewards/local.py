"""Rewards in the caller's own process: for tests, notebooks and one-GPU users; `ctrl_ray.rewards.pool` is the other."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from ctrl_ray.rewards.analytic import AnalyticRewardModel
from ctrl_ray.rewards.model import RewardModel
from ctrl_ray.rewards.protocol import RewardAnswer


class LocalPendingRewards:
    """A request that is worked on when somebody waits for it, so that whoever measures the wait sees the work."""

    def __init__(self, evaluate: Callable[[], RewardAnswer]) -> None:
        self._evaluate = evaluate
        self._answer: RewardAnswer | None = None

    def result(self, timeout_s: float | None = None) -> RewardAnswer:
        """The answer, computed by the first call; errors as in `RewardModel.evaluate`."""
        if self._answer is None:
            self._answer = self._evaluate()
        return self._answer


class LocalRewards:
    """The reward protocol around a model in this process."""

    differentiable = True

    def __init__(self, model: RewardModel | AnalyticRewardModel) -> None:
        self.model = model

    @property
    def controls(self) -> dict[str, int]:
        """Number of classes of each control, in the order of the label columns."""
        return self.model.controls

    def submit(self, latents: Tensor, prompts: Sequence[str], labels: Tensor, weights: Tensor) -> LocalPendingRewards:
        """See `RewardModel.evaluate` for shapes and errors, which `result` raises."""
        return LocalPendingRewards(functools.partial(self.model.evaluate, latents, prompts, labels, weights))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8."""
        return self.model.decode(latents)

    def class_log_probs(self, inputs: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `RewardModel.class_log_probs`."""
        return self.model.class_log_probs(inputs, prompts)
