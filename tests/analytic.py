"""Training on problems in closed form, in this process: the library's update with a plain torch optimizer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ctrl_ray.config import ScalingConfig, TrainConfig
from ctrl_ray.diffusion.steps import ModelOutput
from ctrl_ray.distributed.engine import learning_rate_factor
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.distributed.method import make_method
from ctrl_ray.distributed.update import CTRL
from ctrl_ray.exact.grid import Answer, Solution, policy_answer, solve_on_grid
from ctrl_ray.exact.suite import Case
from ctrl_ray.gradients.adjoint import Estimator
from ctrl_ray.policy.analytic import AnalyticPolicy
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.verification.cases import averaged_updates, case_config, case_learner, policy_means, reward_model


class PlainEngine:
    """What `Learner` needs of an engine, on torch's AdamW."""

    def __init__(self, policy: AnalyticPolicy, config: TrainConfig) -> None:
        self.policy, self.config = policy, config
        self.latent_shape = policy.latent_shape
        self.learning_rate = config.optimizer.learning_rate
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=self.learning_rate,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            weight_decay=0.0,
        )

    def __call__(self, latents: Tensor, time: Tensor, inputs: Inputs, *, reference: bool) -> ModelOutput:
        """The policy's forward."""
        return self.policy(latents, time, inputs, reference=reference)

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients."""
        loss.backward()

    def step(self, update: int) -> float:
        """One update at the schedule's learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate * learning_rate_factor(self.config, update)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 0.0


def make_learner(case: Case, engine: type[PlainEngine] = PlainEngine) -> tuple[Learner, AnalyticPolicy]:
    """A learner on the case, with local rewards."""
    rewards = LocalRewards(reward_model([case]))
    return case_learner(case, case_config(case, ScalingConfig()), rewards, Rank(0, 1, torch.device("cpu")), engine)


def train(
    case: Case, estimator: Estimator | None = None, engine: type[PlainEngine] = PlainEngine
) -> tuple[Answer, Solution]:
    """Train the case to its end; the law of coordinate 0 that is reached, and the exact answers."""
    learner, policy = make_learner(case, engine)
    method = make_method(learner.config) if estimator is None else CTRL(estimator)
    *_, (_, averaged) = averaged_updates(learner, policy, method)
    solution = solve_on_grid(case.problem, num_bins=600, controlled_from=case.controlled_from)
    return policy_answer(case.problem, solution.grid, means_on(solution.grid.centres, learner, averaged)), solution


def means_on(centres: np.ndarray, learner: Learner, policy: AnalyticPolicy) -> list[np.ndarray]:
    """The policy's means of coordinate 0, step by step."""
    return list(policy_means(learner, policy, centres)[:, :, 0])
