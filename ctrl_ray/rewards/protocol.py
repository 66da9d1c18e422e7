"""What a reward is to the rest of the system: latents and labels in, log p(y|x,c) and its gradient out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ctrl_ray.errors import ConfigError


class RewardAnswer(NamedTuple):
    """The answer to one request."""

    log_probs: Tensor
    """(B, C) float32: log p(y_c | x_0, c) of each control; 0 where the label is null."""
    cotangent: Tensor | None
    """Like the latents, float32, unreduced: d/d latents of Σ_c weights[:, c] log_probs[:, c]; None when the reward has
    no gradient."""


class PendingRewards(Protocol):
    """A request under way."""

    def result(self, timeout_s: float | None = None) -> RewardAnswer:
        """Wait for the answer; RewardError after `timeout_s` seconds or when no actor is left, NonFiniteError when a number
        of the request or the answer is not finite."""
        ...


class Rewards(Protocol):
    """Local, pooled or black-box rewards."""

    differentiable: bool

    @property
    def controls(self) -> dict[str, int]:
        """Number of classes of each control, in the order of the label columns."""
        ...

    def submit(self, latents: Tensor, prompts: Sequence[str], labels: Tensor, weights: Tensor) -> PendingRewards:
        """Ask for the rewards of clean latents.

        latents (B, ...) float32, in the denoiser's scaling; prompts: B strings; labels (B, C) int64, the null label
        is num_classes of that control; weights (B, C) float32, guidance strengths (0 where a control does not count).
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8, as a PNG would store them; for the oracle and for people."""
        ...

    def class_log_probs(self, inputs: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """log p(y|x,c) of every class, (B, K) for each control, of latents or of images (B, H, W, 3) uint8."""
        ...


def require_gradient(rewards: Rewards, estimator_name: str, needs_cotangent: bool) -> None:
    """ConfigError when an estimator carries the reward's gradient back to the policy and the reward has none.

    needs_cotangent: whether it does (`Estimator.needs_cotangent`).
    """
    if needs_cotangent and not rewards.differentiable:
        raise ConfigError(
            f"estimator.name is {estimator_name!r}, which needs the gradient of the reward, but {type(rewards).__name__} has "
            "none (its `differentiable` is False); use --estimator.name reinforce with --group-size 4 or more"
        )
