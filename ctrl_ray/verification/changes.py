"""A problem with a known answer, with some of its numbers replaced by those of the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ctrl_ray.exact.problems import ComponentReward, GaussianReward, LogisticReward, Mixture, Problem, Reward
from ctrl_ray.exact.prompts import MarginalReward, PromptRule
from ctrl_ray.exact.suite import Case


def changed(case: Case, changes: Mapping[str, Any], *, name: str, estimator_steps: int, seed: int) -> Case:
    """The case under another name, with `changes` by the names of the flags; what is not in them stays.

    estimator_steps: 0 is one step for last_k, and all for adjoint_matching. ConfigError for numbers that make no problem.
    """
    problem = _changed_problem(case.problem, changes, name)
    efforts = {key: changes[key] for key in ("num_updates", "batch_size", "learning_rate") if key in changes}
    estimator = changes.get("estimator", case.estimator)
    steps = estimator_steps or (1 if estimator == "last_k" else 0)
    return dataclasses.replace(
        case,
        problem=problem,
        coordinates=tuple(range(problem.dimension)) if problem.repeated else case.coordinates,
        effort=dataclasses.replace(case.effort, **efforts),
        estimator=estimator,
        estimator_steps=steps,
        controlled_from=problem.sampler.num_steps - steps if estimator == "last_k" else 0,
        latent_reduction=changes.get("latent_reduction", case.latent_reduction),
        seed=seed,
        truth=None if case.truth is None else _changed_problem(case.truth, changes, case.truth.name),
    )


def with_flow(case: Case) -> Case:
    """The case with flow matching in the place of DDIM."""

    def of(problem: Problem) -> Problem:
        sampler = dataclasses.replace(problem.sampler, kernel="flow")
        return dataclasses.replace(problem, name=f"{problem.name}, flow", sampler=sampler)

    return dataclasses.replace(case, problem=of(case.problem), truth=None if case.truth is None else of(case.truth))


def _changed_problem(problem: Problem, changes: Mapping[str, Any], name: str) -> Problem:
    sampler = dataclasses.replace(
        problem.sampler, **{name: changes[name] for name in ("num_steps", "eta", "sde") if name in changes}
    )
    mixture = _changed_mixture(problem.mixture, changes)
    return dataclasses.replace(
        problem,
        name=name,
        mixture=mixture,
        rewards=tuple(_changed_reward(reward, mixture, changes) for reward in problem.rewards),
        guidance_strengths=changes.get("guidance_strength", problem.guidance_strengths),
        kl_coef=changes.get("kl_coef", problem.kl_coef),
        sampler=sampler,
        dimension=changes.get("dimension", problem.dimension),
    )


def _changed_mixture(mixture: Mixture, changes: Mapping[str, Any]) -> Mixture:
    return Mixture(*(changes.get(part, getattr(mixture, part)) for part in ("means", "stds", "weights")))


def _changed_reward(reward: Reward, mixture: Mixture, changes: Mapping[str, Any]) -> Reward:
    if isinstance(reward, GaussianReward):
        return GaussianReward(changes.get("reward_target", reward.target), changes.get("reward_std", reward.std))
    if isinstance(reward, LogisticReward):
        return LogisticReward(changes.get("reward_slope", reward.slope), reward.offset)
    if isinstance(reward, MarginalReward):
        return MarginalReward(tuple(_changed_rule(rule, changes) for rule in reward.rules))
    assert isinstance(reward, ComponentReward)
    return ComponentReward(mixture, min(reward.index, len(mixture.means) - 1))


def _changed_rule(rule: PromptRule, changes: Mapping[str, Any]) -> PromptRule:
    mixture = _changed_mixture(rule.mixture, changes)
    return dataclasses.replace(rule, mixture=mixture, reward=_changed_reward(rule.reward, mixture, changes))
