"""The target of every baseline, p_pre(x|c) · e^ℓ(x) / Z with ℓ = Σ_c λ_c log p̂_c(y_c|x, c): ℓ of each sample and its gradient.

Both are summed over controls and never over samples: whatever a baseline does with one image knows nothing of the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.rewards.protocol import Rewards


def log_tilt(rewards: Rewards, latents: Tensor, inputs: Inputs, exponents: Sequence[float]) -> Tensor:
    """ℓ of clean latents (B, ...), (B,) float64, without a gradient.

    exponents: λ of the first columns of the labels, in the order of `rewards.controls`; a null label counts nothing.
    """
    believed = rewards.class_log_probs(latents, inputs.condition.prompts)
    total = torch.zeros(len(latents), dtype=torch.float64, device=latents.device)
    for column, (name, exponent) in enumerate(zip(rewards.controls, exponents, strict=False)):
        total += exponent * log_prob_of(believed[name].to(latents.device, torch.float64), inputs.labels[:, column])
    return total


def log_prob_of(log_probs: Tensor, labels: Tensor) -> Tensor:
    """log p of the labels (B,), like the log_probs (B, K); 0 for the null label K."""
    padded = torch.nn.functional.pad(log_probs, (0, 1))
    return padded.gather(1, labels.to(log_probs.device)[:, None])[:, 0]


def log_tilt_and_gradient(
    rewards: Rewards, latents: Tensor, inputs: Inputs, exponents: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """(ℓ (B,) float64, ∇ℓ like the latents) of clean latents (B, ...)."""
    labels = inputs.labels[:, : len(exponents)]
    weights = torch.tensor(tuple(exponents), dtype=torch.float32, device=latents.device).expand(len(latents), -1)
    answer = rewards.submit(latents.detach(), inputs.condition.prompts, labels, weights).result()
    assert answer.cotangent is not None
    tilts = (weights.double() * answer.log_probs.to(latents.device, torch.float64)).sum(1)
    return tilts, answer.cotangent.to(latents.device, latents.dtype)


def require_rewards(rewards: Rewards | None, method: str, *, gradient: bool) -> Rewards:
    """The rewards; ConfigError where there are none, or (gradient) where they have no gradient."""
    if rewards is None:
        raise ConfigError(f"method {method} asks the classifiers on its way, but no rewards are given to the sampler")
    if gradient and not getattr(rewards, "differentiable", True):
        raise ConfigError(
            f"method {method} needs the gradient of the reward, but {type(rewards).__name__} has none (its `differentiable` is "
            "False); use best_of_n, rejection, smc, svdd or fk_steering, which need none"
        )
    return rewards
