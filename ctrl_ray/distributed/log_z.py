"""Enough samples of the pre-trained model to know log Z: the most that any sampler's objective can reach."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from ctrl_ray.config import ControlConfig, EvaluationConfig, ScalingConfig
from ctrl_ray.distributed.sampling import SamplingJob, evaluation_ids, sample_policy
from ctrl_ray.evaluation.certificate import log_z_errors
from ctrl_ray.evaluation.samples import EvaluationSamples, concatenate
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.model import RewardModelSpec

_MARGIN = 1.2
"""A standard error is an estimate itself; so much more than it asks for is drawn."""


def draw_for_log_z(
    first: EvaluationSamples,
    job: SamplingJob,
    rewards: PooledRewards | RewardModelSpec,
    scaling: ScalingConfig,
    controls: Mapping[str, ControlConfig],
    kl_coef: float,
    settings: EvaluationConfig,
) -> EvaluationSamples:
    """The samples of `first` and as many more of `job`, without images, as log Z of every combination of classes needs:
    `settings.log_z_samples` at least, then until the largest standard error is below `log_z_standard_error`, or there are
    `max_log_z_samples`.

    first: of `job` with the first of the `evaluation_ids`, without images.
    """
    job = dataclasses.replace(job, with_images=False)
    have = first
    while True:
        largest = float(log_z_errors(controls, kl_coef, have.class_log_probs).max())
        wanted = settings.log_z_samples
        if largest > settings.log_z_standard_error:
            wanted = max(wanted, math.ceil(_MARGIN * len(have) * (largest / settings.log_z_standard_error) ** 2))
        wanted = min(wanted, settings.max_log_z_samples)
        if wanted <= len(have):
            return have
        print(
            f"log Z      drawing {wanted - len(have)} more samples of the pre-trained model; by {len(have)} it is known to "
            f"{largest:.2f} nats",
            flush=True,
        )
        more = dataclasses.replace(job, sample_ids=tuple(evaluation_ids(wanted)[len(have) :]))
        have = concatenate([have, sample_policy(more, rewards, scaling)])
