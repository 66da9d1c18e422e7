"""What an adapter needs for sampling with candidates: its classifiers, and the share of pre-trained paths."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
from scipy.special import logsumexp

from ctrl_ray.candidates.weights import CandidateShare, choose_share, log_tilts
from ctrl_ray.classifiers.classifier import copy_classifier
from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.sampling import SamplingJob, sample_policy
from ctrl_ray.driver.pre_trained import has_target
from ctrl_ray.evaluation.certificate import Paths, exponents_of, label_targets
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.gradients.rollout import rollout
from ctrl_ray.policy.adapter import add_training_facts, read_adapter_info
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.runs.copies import CLASSIFIER
from ctrl_ray.runs.finished import find_classifiers

MOST_SCORED = 256
"""Pre-trained paths that are drawn to choose the share."""


def carry_classifiers(config: TrainConfig, adapter: Path) -> None:
    """Copy the run's classifiers into its adapter, ADAPTER/classifier/NAME, so that they travel with it.

    Controls that are kept from an initial adapter bring theirs from there, where it has one.
    """
    if config.init_adapter is not None:
        kept = [name for name in read_adapter_info(config.init_adapter).controls if name not in config.controls]
        for name, folder in find_classifiers(config.init_adapter, kept, {}).items():
            copy_classifier(folder, adapter / CLASSIFIER / name)
    for name, control in config.controls.items():
        assert control.classifier is not None  # stage 1 is done
        copy_classifier(control.classifier, adapter / CLASSIFIER / name)


def store_candidate_share(
    config: TrainConfig,
    adapter: Path,
    job: SamplingJob,
    rewards: PooledRewards | RewardModelSpec,
    before: EvaluationSamples,
    after: EvaluationSamples,
) -> CandidateShare | None:
    """Choose the share of pre-trained candidates, write it into `adapter.json` with the efficiency it promises, and say so.

    At most MOST_SCORED pre-trained paths are drawn again, with the policy's log-ratio. None where candidates have no weights:
    no target (`has_target`), or no log-ratios.

    Args:
        job: How the evaluation's samples of the pre-trained model were drawn.
        before: These samples, for the Z of each target.
        after: The policy's samples, with their log-ratios.
    """
    if not has_target(config) or after.log_ratio is None:
        return None
    part = dataclasses.replace(
        job,
        adapter=str(adapter),
        reference=True,
        sample_ids=job.sample_ids[:MOST_SCORED],
        with_kl=False,
        with_images=False,
        draw=functools.partial(rollout, with_log_ratio=True),
    )
    exponents = exponents_of(config.controls, config.kl_coef)
    chosen = candidate_share(before, after, sample_policy(part, rewards, config.scaling), exponents)
    add_training_facts(adapter, {"candidate_share": chosen.share, "candidate_efficiency": chosen.efficiency})
    print(
        f"sampling with candidates: {chosen.share:.3g} of them pre-trained; a large group counts as {chosen.efficiency:.0%} of "
        "its number (effective sample size)",
        flush=True,
    )
    return chosen


def candidate_share(
    before: EvaluationSamples, after: EvaluationSamples, scored: EvaluationSamples, exponents: dict[str, float]
) -> CandidateShare:
    """The best share, from the policy's paths and pre-trained ones with log-ratios; see `store_candidate_share`.

    Weights are divided by the Z of their own target before they are compared.
    """
    labels = np.concatenate([after.labels, scored.labels])
    targets, tilts_before = label_targets(labels, exponents, before.class_log_probs)
    log_zs = (logsumexp(tilts_before, axis=1) - np.log(tilts_before.shape[1]))[targets]
    parts = (after, log_zs[: len(after)]), (scored, log_zs[len(after) :])
    policy, pre_trained = (
        Paths(log_tilts(samples.class_log_probs, samples.labels, exponents) - log_z, samples.log_ratio)
        for samples, log_z in parts
    )
    return choose_share(policy, pre_trained)
