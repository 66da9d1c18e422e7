"""Rewards in closed form, behind the same interface as decoder and classifiers: what a problem with a known answer asks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from ctrl_ray.errors import RewardError
from ctrl_ray.exact.problems import ComponentReward, GaussianReward, LogisticReward, Mixture, Reward
from ctrl_ray.exact.prompts import MarginalReward
from ctrl_ray.rewards.protocol import RewardAnswer

CONTROLS = ("first", "second")
"""The control of coordinate 0 and that of coordinate 1; each has one class, 'asked', and a null label."""


class AnalyticRewardModel(nn.Module):
    """log p(y|x, c): control i reads coordinate i, and the prompt says which problem's rewards count."""

    chunk_size = 0
    """Unused: everything here is small."""

    def __init__(self, rewards: Mapping[str, Sequence[Reward]], repeated: Collection[str] = ()) -> None:
        """rewards: of each prompt, one or two. repeated: prompts whose one reward is asked for at every coordinate."""
        super().__init__()
        self._repeated = frozenset(repeated)
        self._rewards = {prompt: tuple(row) for prompt, row in rewards.items()}

    @property
    def controls(self) -> dict[str, int]:
        """Number of classes of each control."""
        return dict.fromkeys(CONTROLS, 1)

    def evaluate(self, latents: Tensor, prompts: Sequence[str], labels: Tensor, weights: Tensor) -> RewardAnswer:
        """log p (B, C) and the cotangent d/d latents Σ_c weights[:, c] log p_c, (B, D); null labels count nothing."""
        with torch.enable_grad():
            leaf = latents.detach().double().requires_grad_(True)
            columns = [leaf.new_zeros(len(leaf)) for _ in range(labels.shape[1])]
            for prompt in dict.fromkeys(prompts):
                rows = torch.tensor([theirs == prompt for theirs in prompts])
                for column, reward in enumerate(self._of(prompt)[: len(columns)]):
                    asked = rows & (labels[:, column] == 0)
                    read = leaf if prompt in self._repeated else leaf[:, column : column + 1]
                    columns[column] = torch.where(asked, log_prob(reward, read).sum(1), columns[column])
            log_probs = torch.stack(columns, dim=1)
            (cotangent,) = torch.autograd.grad((weights.double() * log_probs).sum(), leaf)
        return RewardAnswer(log_probs.detach().float(), cotangent.float())

    def decode(self, latents: Tensor) -> Tensor:
        """There are no images here."""
        raise RewardError("a problem in closed form has no images to decode")

    def class_log_probs(self, inputs: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """log p of the one class of each control that has a reward, (B, 1)."""
        zeros = torch.zeros(len(inputs), len(CONTROLS))
        answer = self.evaluate(inputs, prompts, zeros.long(), zeros)
        return {name: answer.log_probs[:, column : column + 1] for column, name in enumerate(CONTROLS)}

    def _of(self, prompt: str) -> tuple[Reward, ...]:
        if prompt not in self._rewards:
            raise RewardError(f"prompt {prompt!r} has no reward; known ones are {sorted(self._rewards)}")
        return self._rewards[prompt]


def log_prob(reward: Reward, x: Tensor) -> Tensor:
    """`reward.log_prob` in torch, differentiable, like x."""
    if isinstance(reward, GaussianReward):
        return torch.distributions.Normal(x, reward.std).log_prob(torch.tensor(reward.target).to(x))
    if isinstance(reward, LogisticReward):
        return torch.nn.functional.logsigmoid(reward.slope * x + reward.offset)
    if isinstance(reward, ComponentReward):
        return _component_log_densities(reward.mixture, x).log_softmax(-1)[..., reward.index]
    if isinstance(reward, MarginalReward):
        rules = reward.rules
        joint = torch.stack([math.log(r.share) + _component_log_densities(r.mixture, x).logsumexp(-1) for r in rules])
        labelled = joint + torch.stack([log_prob(rule.reward, x) for rule in rules])
        return labelled.logsumexp(0) - joint.logsumexp(0)
    raise TypeError(f"no torch form of {type(reward).__name__}")


def _component_log_densities(mixture: Mixture, x: Tensor) -> Tensor:
    """`Mixture.component_log_densities` of the data in torch, (..., K)."""
    means, stds, weights = (torch.tensor(v).to(x) for v in (mixture.means, mixture.stds, mixture.probabilities))
    return torch.distributions.Normal(means, stds).log_prob(x[..., None]) + weights.log()
