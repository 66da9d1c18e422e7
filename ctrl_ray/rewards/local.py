"""Rewards in the caller's own process: for tests, notebooks and one-GPU users; `ctrl_ray.rewards.pool` is the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ctrl_ray.rewards.analytic import AnalyticRewardModel
from ctrl_ray.rewards.model import RewardModel
from ctrl_ray.rewards.protocol import RewardAnswer


class LocalPendingRewards(NamedTuple):
    """An answer that is already there."""

    rewarded: RewardAnswer

    def result(self, timeout_s: float | None = None) -> RewardAnswer:
        """The answer, at once."""
        return self.rewarded


class LocalRewards:
    """The reward protocol around a model in this process; `submit` computes before it returns."""

    differentiable = True

    def __init__(self, model: RewardModel | AnalyticRewardModel) -> None:
        self.model = model

    @property
    def controls(self) -> dict[str, int]:
        """Number of classes of each control, in the order of the label columns."""
        return self.model.controls

    def submit(self, latents: Tensor, prompts: Sequence[str], labels: Tensor, weights: Tensor) -> LocalPendingRewards:
        """See `RewardModel.evaluate` for shapes and errors; they are raised here."""
        return LocalPendingRewards(self.model.evaluate(latents, prompts, labels, weights))

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8."""
        return self.model.decode(latents)

    def class_log_probs(self, inputs: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """See `RewardModel.class_log_probs`."""
        return self.model.class_log_probs(inputs, prompts)
