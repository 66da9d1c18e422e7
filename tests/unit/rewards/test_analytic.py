"""Closed-form rewards behind the reward interface."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ctrl_ray.errors import RewardError
from ctrl_ray.exact.problems import ComponentReward, GaussianReward, LogisticReward, Reward
from ctrl_ray.exact.prompts import MarginalReward, PromptRule
from ctrl_ray.exact.suite import THREE_MODES, TWO_MODES
from ctrl_ray.rewards.analytic import AnalyticRewardModel

REWARDS: list[Reward] = [
    GaussianReward(2.0, 0.5),
    LogisticReward(2.5, 0.3),
    ComponentReward(THREE_MODES, 1),
    MarginalReward(
        (
            PromptRule(share=1.0, mixture=TWO_MODES, reward=LogisticReward(1.0, -2.0)),
            PromptRule(share=3.0, mixture=THREE_MODES, reward=ComponentReward(THREE_MODES, 2)),
        )
    ),
]


@pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: type(reward).__name__)
def test_values_are_the_solvers_and_cotangents_their_slopes(reward: Reward) -> None:
    """Weighted; coordinates without a reward have no slope."""
    x = torch.linspace(-3, 3, 21)
    latents = torch.stack([x, torch.ones(21)], dim=1)
    labels, weights = torch.zeros(21, 1, dtype=torch.long), torch.full((21, 1), 3.0)
    answer = AnalyticRewardModel({"p": (reward,)}).evaluate(latents, ["p"] * 21, labels, weights)
    np.testing.assert_allclose(answer.log_probs[:, 0].numpy(), reward.log_prob(x.numpy()), rtol=2e-5, atol=1e-6)
    h = 1e-5
    grid = x.double().numpy()
    slope = (reward.log_prob(grid + h) - reward.log_prob(grid - h)) / (2 * h)
    assert answer.cotangent is not None
    np.testing.assert_allclose(answer.cotangent[:, 0].numpy(), 3 * slope, rtol=1e-4, atol=1e-4)
    assert answer.cotangent[:, 1].abs().max() == 0


def test_prompts_choose_the_problem_and_null_labels_count_nothing() -> None:
    """Rows of two problems in one request."""
    model = AnalyticRewardModel(
        {"one": (GaussianReward(0.0, 1.0),), "two": (LogisticReward(1.0), GaussianReward(1.0, 1.0))}
    )
    latents = torch.tensor([[0.5, 0.0], [0.5, 0.0], [0.5, 0.0]])
    labels = torch.tensor([[0, 0], [0, 0], [1, 0]])
    answer = model.evaluate(latents, ["one", "two", "two"], labels, torch.ones(3, 2))
    expected = [
        [GaussianReward(0.0, 1.0).log_prob(np.array(0.5)), 0.0],
        [LogisticReward(1.0).log_prob(np.array(0.5)), GaussianReward(1.0, 1.0).log_prob(np.array(0.0))],
        [0.0, GaussianReward(1.0, 1.0).log_prob(np.array(0.0))],
    ]
    np.testing.assert_allclose(answer.log_probs.numpy(), np.array(expected, dtype=float), rtol=1e-5)
    assert answer.cotangent is not None and answer.cotangent[2, 0] == 0 and answer.cotangent[1, 0] > 0
    with pytest.raises(RewardError, match="no reward"):
        model.evaluate(latents, ["three"] * 3, labels, torch.ones(3, 2))


def test_a_repeated_reward_is_asked_for_at_every_coordinate() -> None:
    """Another prompt of the same request still reads coordinate 0 alone."""
    reward = GaussianReward(1.0, 1.0)
    model = AnalyticRewardModel({"all": (reward,), "first": (reward,)}, repeated=["all"])
    latents = torch.tensor([[0.5, 2.0, -1.0], [0.5, 2.0, -1.0], [0.5, 2.0, -1.0]])
    labels = torch.tensor([[0], [0], [1]])
    answer = model.evaluate(latents, ["all", "first", "all"], labels, torch.full((3, 1), 2.0))
    log_probs = reward.log_prob(np.array([0.5, 2.0, -1.0]))
    np.testing.assert_allclose(answer.log_probs[:, 0].numpy(), [log_probs.sum(), log_probs[0], 0.0], rtol=1e-6)
    expected = [[1.0, -2.0, 4.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]  # twice the way to 1
    assert answer.cotangent is not None
    np.testing.assert_allclose(answer.cotangent.numpy(), expected, atol=1e-6)
