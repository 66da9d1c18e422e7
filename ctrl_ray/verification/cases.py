"""Training on problems whose answer is known: one worker group and one reward actor serve all cases.

A case goes through the code of an image pipeline (`Learner`, `CTRL.update`, the DeepSpeed engine, the reward pool);
only the denoiser and the reward are closed forms. What comes back is the policy's mean at every bin of the exact
solver's grid, from which its law is computed without sampling.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from torch.optim.swa_utils import AveragedModel

from ctrl_ray.config import (
    ControlConfig,
    EstimatorConfig,
    OptimizerConfig,
    RewardPoolConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.diffusion.ddim import DDIMKernel
from ctrl_ray.diffusion.flow import FlowKernel, flow_sigmas
from ctrl_ray.distributed.engine import PolicyEngine
from ctrl_ray.distributed.environment import worker_environment
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.distributed.method import Method, make_method
from ctrl_ray.distributed.rows import Notice, Stopping
from ctrl_ray.distributed.worker import set_up_process
from ctrl_ray.distributed.worker_group import WorkerGroup, new_channel, run_workers
from ctrl_ray.exact.grid import make_grid
from ctrl_ray.exact.problems import Mixture, Sampler
from ctrl_ray.exact.suite import Case
from ctrl_ray.gradients.rollout import policy_step
from ctrl_ray.policy.analytic import (
    AnalyticPolicy,
    MixtureDenoiser,
    MixtureEncoder,
    MixtureVelocity,
    analytic_scheduler,
)
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.policy.schedule import load_kernel
from ctrl_ray.rewards.analytic import CONTROLS, AnalyticRewardModel
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.rewards.pool import start_reward_pool
from ctrl_ray.rewards.protocol import Rewards

SNAPSHOTS = (0.85, 0.9, 0.95, 1.0)
"""Shares of the updates after which the policy is looked at; their scatter is the optimisation's noise."""

AVERAGED_FROM = 0.5
"""The policy that counts is the average over the updates after this share of them."""

GROUP_SIZE = 64
"""Samples that the score function compares with each other."""


@dataclass(frozen=True)
class Progress:
    """A row from the workers: updates of a case that are done."""

    title: str
    update: int
    num_updates: int


@dataclass(frozen=True)
class ReachedLaw:
    """The policy that training left."""

    means: Mapping[int, np.ndarray]
    """By coordinate, (T, bins): mean of each step at the centres of the solver's grid."""
    earlier: tuple[Mapping[int, np.ndarray], ...]
    """The same at the snapshots before."""


@dataclass(frozen=True)
class Reached:
    """A row from the workers: a case is trained."""

    title: str
    law: ReachedLaw


def train_cases(
    cases: Sequence[Case],
    *,
    num_workers: int = 1,
    use_gpu: bool = False,
    on_progress: Callable[[str, int, int], None],
    on_reached: Callable[[Case, ReachedLaw], None],
) -> None:
    """Train each case on one worker group, in order; on_reached gets each with its policy as soon as it is done.

    num_workers: they share every batch, each on half a CPU (which Ray reserves) or a GPU.
    on_progress(title, update, num_updates) is called while they run. Ray must be connected.
    """
    by_title = {case.title: case for case in cases}
    model = reward_model(cases)
    pool_config = RewardPoolConfig(cpus_per_actor=0.5, threads_per_actor=1)
    scaling = ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, cpus_per_worker=0.5, threads_per_worker=1)
    channel = new_channel()

    def on_row(row: Any) -> None:
        match row:
            case Progress():
                on_progress(row.title, row.update, row.num_updates)
            case Reached():
                on_reached(by_title[row.title], row.law)
            case Notice():
                print(row.text, file=sys.stderr, flush=True)
            case Stopping():
                raise KeyboardInterrupt  # the workers would leave nothing to go on from

    spec = RewardModelSpec(base_model="analytic", classifiers={})
    with (
        tempfile.TemporaryDirectory(prefix="ctrl_ray_verify_") as storage,
        start_reward_pool(spec, pool_config, model=model) as pool,
    ):
        worker = functools.partial(_verify_worker, tuple(cases), scaling, pool.client(), channel)
        group = WorkerGroup(
            worker=worker,
            channel=channel,
            scaling=scaling,
            num_workers=num_workers,
            storage_path=storage,
            run_name="verify",
            max_failures=scaling.max_failures,
            environment=worker_environment(use_gpu=scaling.use_gpu, num_threads=scaling.num_threads),
        )
        run_workers(group, on_row)


def reward_model(cases: Sequence[Case]) -> AnalyticRewardModel:
    """The rewards of all cases; the prompt is the case's title."""
    return AnalyticRewardModel(
        {case.title: case.problem.rewards for case in cases},
        repeated=[case.title for case in cases if case.problem.repeated],
    )


def case_config(case: Case, scaling: ScalingConfig) -> TrainConfig:
    """The configuration that a run of this case has; the prompt is the case's title."""
    problem, effort = case.problem, case.effort
    group_size = GROUP_SIZE if case.estimator == "reinforce" else 1
    groups = -(-(effort.batch_size // group_size) // scaling.fixed_num_workers)
    return TrainConfig(
        base_model="analytic",
        controls={
            name: ControlConfig(guidance_strength=strength, classes=("asked",))
            for name, strength in zip(CONTROLS, problem.guidance_strengths, strict=False)
        },
        seed=case.seed,
        num_updates=effort.num_updates,
        global_batch_size=effort.batch_size,
        micro_batch_size_per_worker=groups * group_size,
        group_size=group_size,
        kl_coef=problem.kl_coef,
        latent_reduction=case.latent_reduction,
        control_dropout=0.0,
        sampler=SamplerConfig(
            num_steps=problem.sampler.num_steps,
            eta=min(1.0, problem.sampler.eta),  # a flow's SDE is the kernel's alone
            reference_steps=problem.sampler.reference_steps,
        ),
        estimator=EstimatorConfig(name=case.estimator, steps=case.estimator_steps),  # type: ignore[arg-type]
        optimizer=OptimizerConfig(
            learning_rate=effort.learning_rate,
            beta2=0.99,
            gradient_clipping=0.0,
            warmup_updates=0,
            final_learning_rate_fraction=0.5,
        ),
        scaling=scaling,
    )


def _verify_worker(cases: tuple[Case, ...], scaling: ScalingConfig, rewards: PooledRewards, channel: Any) -> None:
    for case in cases:
        _train_case(case, case_config(case, scaling), rewards, channel)


def case_learner(
    case: Case,
    config: TrainConfig,
    rewards: Rewards,
    rank: Rank,
    make_engine: Callable[[AnalyticPolicy, TrainConfig], Any] = PolicyEngine,
) -> tuple[Learner, AnalyticPolicy]:
    """What trains a case, and the policy that it trains."""
    mixture = case.problem.mixture
    kernel, denoiser = _reference(mixture, case.problem.sampler, config.sampler)
    policy = AnalyticPolicy(
        denoiser,
        kernel,
        dict.fromkeys(config.controls, 1),
        dimension=case.problem.dimension,
        num_nodes=case.effort.num_nodes,
        shared_steps=case.effort.shared_steps,
    ).to(rank.device)
    learner = Learner(
        config=config,
        engine=make_engine(policy, config),
        kernel=kernel,
        encoder=MixtureEncoder({case.title: mixture.weights}, rank.device),
        rewards=rewards,
        controls=config.controls,
        prompts=(case.title,),
        rank=rank,
    )
    return learner, policy


def _reference(
    mixture: Mixture, sampler: Sampler, config: SamplerConfig
) -> tuple[DDIMKernel | FlowKernel, MixtureDenoiser | MixtureVelocity]:
    """A problem's chain of steps, and what predicts in it."""
    if sampler.kernel == "flow":
        kernel = FlowKernel(
            flow_sigmas(sampler.num_steps, shift=sampler.shift),
            sde=sampler.sde,
            eta=sampler.eta,
            reference_steps=sampler.reference_steps,
        )
        return kernel, MixtureVelocity(mixture.means, mixture.stds)
    scheduler = analytic_scheduler()
    return load_kernel(scheduler, config), MixtureDenoiser(mixture.means, mixture.stds, scheduler.alphas_cumprod)


def _train_case(case: Case, config: TrainConfig, rewards: PooledRewards, channel: Any) -> None:
    rank = set_up_process(config)
    learner, policy = case_learner(case, config, rewards.for_worker(rank.index), rank)
    centres = make_grid(case.problem).centres
    looks = {max(1, round(share * config.num_updates)) for share in SNAPSHOTS}
    taken = []
    for done, averaged in averaged_updates(learner, policy, make_method(config)):
        if rank.index == 0 and done in looks:
            means = policy_means(learner, averaged, centres)
            taken.append({coordinate: means[:, :, coordinate] for coordinate in case.coordinates})
        if rank.index == 0 and (done % 10 == 0 or done == config.num_updates):
            ray.get(channel.put.remote(Progress(case.title, done, config.num_updates)))
    if rank.index == 0:
        ray.get(channel.put.remote(Reached(case.title, ReachedLaw(taken[-1], tuple(taken[:-1])))))


def averaged_updates(learner: Learner, policy: AnalyticPolicy, method: Method) -> Iterator[tuple[int, AnalyticPolicy]]:
    """Make the updates of a case; yields (updates done, average of the policy so far) after each.

    Polyak & Juditsky 1992: at a learning rate that stays large the average over the path is far closer to the optimum
    than a last iterate at a small one. Which mode a trajectory ends in is decided by many small pushes that agree, and
    Adam, which divides each by its noise, moves them together only slowly.
    """
    num_updates = learner.config.num_updates
    averaged = AveragedModel(policy)
    average: Any = averaged.module
    for update in range(num_updates):
        method.update(learner, update)
        if update + 1 > AVERAGED_FROM * num_updates:
            averaged.update_parameters(policy)
        yield update + 1, average


@torch.no_grad()
def policy_means(learner: Learner, policy: AnalyticPolicy, centres: np.ndarray) -> np.ndarray:
    """Mean of every step where all coordinates are at `centres`, (T, bins, D); coordinates do not see each other."""
    device = learner.rank.device
    column = torch.tensor(centres, dtype=torch.float32, device=device)[:, None]
    latents = column.expand(-1, policy.latent_shape[0]).contiguous()
    labels = torch.zeros(len(latents), len(policy.num_classes), dtype=torch.long, device=device)
    inputs = Inputs(learner.encoder.encode([learner.prompts[0]] * len(latents)), labels)
    means = [
        policy_step(policy, learner.kernel, k, latents, inputs, reference=False).mean
        for k in range(learner.kernel.num_steps)
    ]
    return np.asarray(torch.stack(means).double().cpu().numpy())
