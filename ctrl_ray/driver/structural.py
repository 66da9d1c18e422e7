"""The structural parts of a run's gap: draws what tells them, pairs of pre-trained paths and a few paths of the policy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ctrl_ray.distributed.sampling import SamplingJob, evaluation_ids, sample_policy
from ctrl_ray.driver.pre_trained import reference_job
from ctrl_ray.driver.remedies import with_remedies
from ctrl_ray.evaluation.certificate import Estimate, exponents_of, label_targets, mean_standard_error
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.evaluation.structural import initial_noise_part, over_targets, reference_steps_part
from ctrl_ray.planning.preflight import CheckedRun
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.model import RewardModelSpec

_PAIRS_PER_PATH = 10
"""Pairs for each path on which the variances' cost is measured: that takes eighteen denoiser calls' time a step."""
_PAIRS_PER_LATE_PAIR = 4
"""Pairs that part at the start for each that parts before the reference steps, whose laws are narrow."""


def measure_structural(
    checked: CheckedRun,
    rewards: PooledRewards | RewardModelSpec,
    adapter: str,
    scored: EvaluationSamples,
    labels: np.ndarray,
) -> dict[str, Any]:
    """'fixed_variances', 'initial_noise' and, where the sampler has them, 'reference_steps': each {"value", "standard_error"}
    in nats, the mean over the labels asked for; empty with `evaluation.num_pairs` 0.

    Args:
        adapter: Folder of the policy that was trained.
        scored: Samples of `reference_job`, first halves of the pairs.
        labels: (n, C) that the policy was asked for.
    """
    config = checked.config
    count = min(config.evaluation.num_pairs, len(scored))
    if count < 2:
        return {}
    parts = {"initial_noise": (0, initial_noise_part, count)}
    if config.sampler.reference_steps:
        fork_at = config.sampler.num_steps - config.sampler.reference_steps
        parts["reference_steps"] = (fork_at, reference_steps_part, max(2, count // _PAIRS_PER_LATE_PAIR))
    exponents = exponents_of(config.controls, config.kl_coef)
    targets, first = label_targets(labels, exponents, scored.select(np.arange(count)).class_log_probs)
    shares = np.bincount(targets, minlength=len(first)) / len(targets)
    job = dataclasses.replace(reference_job(checked), sample_ids=tuple(evaluation_ids(count)), with_images=False)
    found = {"fixed_variances": _fixed_variances(checked, rewards, dataclasses.replace(job, adapter=adapter))}
    for name, (fork_at, part, pairs) in parts.items():
        with with_remedies(checked):
            forked = dataclasses.replace(job, fork_at=fork_at, sample_ids=job.sample_ids[:pairs])
            again = sample_policy(forked, rewards, config.scaling)
        _, second = label_targets(labels, exponents, again.class_log_probs)
        found[name] = over_targets(part, first[:, :pairs], second, shares)._asdict()
    return found


def _fixed_variances(
    checked: CheckedRun, rewards: PooledRewards | RewardModelSpec, job: SamplingJob
) -> dict[str, float]:
    config = checked.config
    job = dataclasses.replace(
        job,
        reference=False,
        with_kl=False,
        sample_ids=job.sample_ids[: max(2, len(job.sample_ids) // _PAIRS_PER_PATH)],
        batch_size=config.fixed_micro_batch_size,
        gradient_checkpointing=config.scaling.fixed_gradient_checkpointing,
        variance_cost_at=config.kl_coef,
    )
    with with_remedies(checked):
        costs = sample_policy(job, rewards, config.scaling).variance_cost
    assert costs is not None
    return Estimate(float(costs.mean()), mean_standard_error(costs))._asdict()
