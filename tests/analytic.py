"""Training on problems in closed form, in this process: the library's update with a plain torch optimizer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ctrl_ray.config import ScalingConfig, TrainConfig
from ctrl_ray.diffusion.steps import Guidance, ModelOutput
from ctrl_ray.distributed.engine import learning_rate_factor
from ctrl_ray.distributed.training import Learner, Rank, train_update
from ctrl_ray.distributed.verification import case_config
from ctrl_ray.exact.grid import Answer, Solution, policy_answer, solve_on_grid
from ctrl_ray.exact.suite import Case
from ctrl_ray.gradients.estimators import Estimator, make_estimator
from ctrl_ray.gradients.rollout import policy_step
from ctrl_ray.policy.analytic import AnalyticPolicy, MixtureDenoiser, MixtureEncoder, analytic_scheduler
from ctrl_ray.policy.backbone import make_kernel
from ctrl_ray.policy.condition import Condition
from ctrl_ray.rewards.analytic import AnalyticRewardModel
from ctrl_ray.rewards.local import LocalRewards


class PlainEngine:
    """What `Learner` needs of an engine, on torch's AdamW."""

    def __init__(self, policy: AnalyticPolicy, config: TrainConfig) -> None:
        self.policy, self.config = policy, config
        self.latent_shape, self.prediction_type = policy.latent_shape, policy.prediction_type
        self.learning_rate = config.optimizer.learning_rate
        self.optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=self.learning_rate,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            weight_decay=0.0,
        )

    def __call__(
        self,
        latents: Tensor,
        time: Tensor,
        condition: Condition,
        labels: Tensor,
        guidance: Guidance,
        *,
        reference: bool,
    ) -> ModelOutput:
        """The policy's forward."""
        return self.policy(latents, time, condition, labels, guidance, reference=reference)

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


def make_learner(
    case: Case, estimator: Estimator | None = None, engine: type[PlainEngine] = PlainEngine
) -> tuple[Learner, AnalyticPolicy]:
    """A learner on the case, with local rewards."""
    config = case_config(case, ScalingConfig())
    scheduler = analytic_scheduler()
    kernel = make_kernel(scheduler, config.sampler.num_steps, config.sampler.eta)
    mixture = case.problem.mixture
    policy = AnalyticPolicy(
        MixtureDenoiser(mixture.means, mixture.stds, scheduler.alphas_cumprod),
        kernel,
        dict.fromkeys(config.controls, 1),
        dimension=case.problem.dimension,
        num_nodes=case.effort.num_nodes,
        shared_steps=case.effort.shared_steps,
    )
    learner = Learner(
        config=config,
        engine=engine(policy, config),  # type: ignore[arg-type]
        kernel=kernel,
        encoder=MixtureEncoder({case.title: mixture.weights}),
        rewards=LocalRewards(AnalyticRewardModel({case.title: case.problem.rewards})),
        estimator=estimator or make_estimator(config.estimator, config.sampler.num_steps),
        controls=config.controls,
        prompts=(case.title,),
        rank=Rank(0, 1, torch.device("cpu")),
    )
    return learner, policy


def train(
    case: Case, estimator: Estimator | None = None, engine: type[PlainEngine] = PlainEngine
) -> tuple[Answer, Solution]:
    """Train the case to its end; the law of coordinate 0 that is reached, and the exact answers."""
    learner, policy = make_learner(case, estimator, engine)
    for update in range(case.effort.num_updates):
        train_update(learner, update)
    solution = solve_on_grid(case.problem, num_bins=600, controlled_from=case.controlled_from)
    return policy_answer(case.problem, solution.grid, means_on(solution.grid.centres, learner, policy)), solution


@torch.no_grad()
def means_on(centres: np.ndarray, learner: Learner, policy: AnalyticPolicy) -> list[np.ndarray]:
    """The policy's means of coordinate 0, step by step."""
    latents = torch.tensor(centres, dtype=torch.float32)[:, None].expand(-1, policy.latent_shape[0]).contiguous()
    condition = learner.encoder.encode([learner.prompts[0]] * len(latents))
    labels = torch.zeros(len(latents), len(policy.num_classes), dtype=torch.long)
    return [
        policy_step(policy, learner.kernel, k, latents, condition, labels, Guidance(), reference=False)
        .mean[:, 0]
        .double()
        .numpy()
        for k in range(learner.kernel.num_steps)
    ]
