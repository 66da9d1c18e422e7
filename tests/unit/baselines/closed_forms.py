"""Baselines on problems in closed form, and what their laws must be, from the chain's equations alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrl_ray.baselines.noise import ImageNoise
from ctrl_ray.baselines.particles import ParticleFilter, Particles
from ctrl_ray.baselines.sampler import Call
from ctrl_ray.distributed.learner import Learner
from ctrl_ray.exact.chain import alphas_cumprod, timesteps
from ctrl_ray.exact.problems import GaussianReward
from ctrl_ray.exact.suite import Case, gaussian
from ctrl_ray.gradients.rollout import NoiseSource, Trajectory, keyed_noise
from ctrl_ray.policy.analytic import AnalyticPolicy
from ctrl_ray.policy.protocol import Inputs
from tests.analytic import make_learner


@dataclass(frozen=True)
class Bench:
    """A case and what samples it."""

    case: Case
    learner: Learner
    policy: AnalyticPolicy

    @classmethod
    def of(cls, case: Case) -> Bench:
        return cls(case, *make_learner(case))

    @property
    def num_steps(self) -> int:
        return self.learner.kernel.num_steps

    def inputs(self, count: int) -> Inputs:
        prompts = self.learner.prompts * count
        return Inputs(self.learner.encoder.encode(prompts), torch.zeros(count, 1, dtype=torch.long))

    def noise(self, count: int, seed: int = 0) -> NoiseSource:
        return keyed_noise(seed, 0, range(count), (1,), self.num_steps)

    def sample(self, sampler: Any, count: int, noise: NoiseSource | None = None, seed: int = 0) -> Trajectory:
        noise = self.noise(count, seed) if noise is None else noise
        found: Trajectory = sampler(
            self.policy,
            self.learner.kernel,
            self.inputs(count),
            noise,
            self.learner.rewards,
            reference=True,
            with_kl=True,
        )
        return found

    def particles(self, sampler: ParticleFilter, count: int, seed: int = 0) -> Particles:
        call = Call(
            policy=self.policy,
            kernel=self.learner.kernel,  # type: ignore[arg-type]
            inputs=self.inputs(count),
            noise=ImageNoise(self.noise(count, seed)),
            rewards=self.learner.rewards,
            on_step=lambda *_: None,
        )
        with torch.no_grad():
            return sampler.filter(call)


def wide_gaussian(num_steps: int, reward_std: float = 1.5) -> Case:
    """T1 with a reward that no twist is overconfident about."""
    case = gaussian()
    sampler = dataclasses.replace(case.problem.sampler, num_steps=num_steps)
    problem = dataclasses.replace(case.problem, rewards=(GaussianReward(2.0, reward_std),), sampler=sampler)
    return dataclasses.replace(case, problem=problem)


@dataclass(frozen=True)
class GaussianStepLaw:
    """One guided step of N(0, 1) data: x' = scale x + offset + std z."""

    scale: float
    offset: float
    std: float
    ref_scale: float
    """Of the pre-trained step, whose offset is 0."""


Guide = Callable[[float, float, float, float], tuple[float, float]]
"""(ᾱ, ᾱ', slope of x̂_0 in x, number of the step) to (coefficient, constant) that the mean moves by, in x."""


def guided_chain(num_steps: int, guide: Guide) -> list[GaussianStepLaw]:
    """DDIM at eta 1 with the exact ε of N(0, 1): ε = √(1 − ᾱ) x, so x̂_0 = √ᾱ x."""
    table, stride = alphas_cumprod(), 1000 // num_steps
    chain = []
    for k, t in enumerate(timesteps(num_steps)):
        alpha, following = float(table[t]), float(table[t - stride] if t >= stride else table[0])
        std = np.sqrt((1 - following) / (1 - alpha) * (1 - alpha / following))
        ref = np.sqrt(following) * np.sqrt(alpha) + np.sqrt(max(0.0, 1 - following - std**2)) * np.sqrt(1 - alpha)
        coefficient, constant = guide(alpha, following, np.sqrt(alpha), k)
        chain.append(GaussianStepLaw(float(ref + coefficient), float(constant), float(std), float(ref)))
    return chain


def law_of(chain: list[GaussianStepLaw]) -> tuple[float, float, float]:
    """(mean, standard deviation of x_0, KL of the path to the pre-trained one) from x_T ~ N(0, 1)."""
    mean, variance, kl = 0.0, 1.0, 0.0
    for step in chain:
        push = step.scale - step.ref_scale
        kl += ((push * mean + step.offset) ** 2 + push**2 * variance) / (2 * step.std**2)
        mean, variance = step.scale * mean + step.offset, step.scale**2 * variance + step.std**2
    return mean, float(np.sqrt(variance)), kl


def affine_law(bench: Bench, sampler: Any) -> tuple[float, float]:
    """(mean, standard deviation) of x_0 of a sampler that is affine in its noise: without noise, and with one of each."""
    slots = bench.num_steps + 1
    unit = torch.cat([torch.zeros(1, slots), torch.eye(slots)])[..., None]
    ends: Tensor = bench.sample(sampler, slots + 1, lambda k: unit[:, k]).clean_latents[:, 0].double()
    return float(ends[0]), float((ends[1:] - ends[0]).square().sum().sqrt())
