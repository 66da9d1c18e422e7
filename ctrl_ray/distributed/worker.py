"""The function that every Ray Train worker runs."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.distributed.checkpoints import report_checkpoint, restore_engine
from ctrl_ray.distributed.evaluate import evaluate_policy
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.distributed.method import Method, make_method
from ctrl_ray.distributed.noise_floor import add_noise_floor
from ctrl_ray.distributed.rows import EvaluationDone, Notice, Row, Started, Stop, Stopped, UpdateDone
from ctrl_ray.distributed.scores import UNSCORED, evaluation_score, exceeds_target_kl, told_with_checkpoint
from ctrl_ray.errors import HOPELESS, CheckpointError, naming_memory
from ctrl_ray.policy.adapter import AdapterInfo
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.backbones.text import TextEncoder
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.precision import set_float32_precision
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.model import RewardModelSpec, load_reward_model
from ctrl_ray.rewards.protocol import Rewards, require_gradient
from ctrl_ray.runs.copies import FolderCopy, folder_here


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What the driver gives to the workers."""

    config: TrainConfig
    controls: Mapping[str, ControlConfig]
    """The policy's, in column order."""
    prompts: tuple[str, ...]
    evaluation_prompts: tuple[str, ...] = ()
    """Of the evaluations; none: those of training."""
    pre_trained_log_probs: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """Control to (m, K): beliefs about samples of the pre-trained model, by which evaluations know log Z."""
    rewards: PooledRewards | RewardModelSpec
    """The pool's client, or what each worker loads for itself."""
    info: AdapterInfo
    channel: Any
    """MetricsChannel handle."""
    make_method: Callable[[TrainConfig], Method] = make_method
    """How the policy is trained; a module's function, which travels by name."""
    copies: Mapping[str, FolderCopy] = field(default_factory=dict, repr=False)
    """The adapter that the run goes on from, by value, for hosts that do not have it."""


def train_worker(job: TrainJob) -> None:
    """Stages 2 and 3 on one worker: build the policy, resume if there is a checkpoint, update, evaluate, checkpoint.

    An error that a restart cannot cure is left with the channel; the workers that Ray Train restarts return at once.
    """
    if ray.get(job.channel.failure.remote()) is not None:
        return
    try:
        with naming_memory("before the first update"):
            _train(job)
    except HOPELESS as error:
        ray.get(job.channel.fail.remote(error))
        raise


def _train(job: TrainJob) -> None:
    config = job.config
    rank = set_up_process(config)
    method = job.make_method(config)
    learner, progress = _build_learner(job, rank)
    require_gradient(learner.rewards, config.estimator.name, method.needs_cotangent)
    first_update = progress["updates_done"]
    if first_update == 0 and config.evaluation.every_updates:
        if config.evaluation.asynchronous:
            _leave_checkpoint(job, learner, progress, UNSCORED, validate=True)
        else:
            _evaluate(job, learner, progress)
    leaving: set[str] = set()
    for update in range(first_update, config.num_updates):
        with naming_memory(f"update {update}"):
            metrics = method.update(learner, update)
        progress["updates_done"] = update + 1
        stop = _tell(job, rank, UpdateDone(update + 1, metrics))
        announced = _announced_losses(leaving)
        stop = _finish_update(job, learner, progress, stop, save=bool(announced))
        for node in announced:
            text = f"node {node[:8]} will be taken away: left a checkpoint after update {update + 1}"
            _tell(job, rank, Notice(text))
        if stop is not None:
            _tell(job, rank, Stopped(update + 1, stop))
            return


def _announced_losses(known: set[str]) -> list[str]:
    """Nodes of this group that are about to be taken away (a spot notice, as Ray's drain of the node), each of them once;
    collective. Ray Train starts the group anew, without them, when they are gone."""
    notice = ray.train.get_preemption_info()
    new = [] if notice is None else [node for node in notice.preempted_node_ids if node not in known]
    known.update(new)
    return new


def _finish_update(
    job: TrainJob, learner: Learner, progress: dict[str, Any], stop: Stop | None, *, save: bool
) -> Stop | None:
    """Evaluate and checkpoint when it is time (or `save` is set); returns why to stop now, None to go on."""
    config, done = job.config, progress["updates_done"]
    every, last = config.evaluation.every_updates, progress["updates_done"] == config.num_updates
    score = UNSCORED
    evaluate = bool(last or (every and done % every == 0)) and stop is None
    if evaluate and not config.evaluation.asynchronous:
        metrics = _evaluate(job, learner, progress)
        score = evaluation_score(metrics, config)
        stop = exceeds_target_kl(config, metrics)
    if evaluate or stop is not None or save or done % config.checkpoint_every_updates == 0:
        validate = evaluate and config.evaluation.asynchronous
        _leave_checkpoint(job, learner, progress, score, validate=validate)
    return stop


def _leave_checkpoint(
    job: TrainJob, learner: Learner, progress: dict[str, Any], score: float, *, validate: bool
) -> None:
    """Collective. The rows of metrics travel along: the driver may end before it has written the last of them."""
    channel = job.channel
    rows = ray.get(channel.history.remote()) if learner.rank.index == 0 else []

    def on_lasting(error: CheckpointError) -> None:
        ray.get(channel.fail.remote(error))

    report_checkpoint(
        learner.engine,
        _info(job, progress),
        progress,
        score,
        rows=rows,
        validate=validate,
        on_lasting=on_lasting,
    )


def _info(job: TrainJob, progress: Mapping[str, Any]) -> AdapterInfo:
    """The adapter's facts, with how far the training is."""
    return dataclasses.replace(job.info, training={**job.info.training, **progress})


def _evaluate(job: TrainJob, learner: Learner, progress: dict[str, Any]) -> dict[str, float]:
    with naming_memory(f"the evaluation after update {progress['updates_done']}"):
        metrics = evaluate_policy(learner, job.config.evaluation.num_samples)
    progress |= told_with_checkpoint(metrics)
    _tell(job, learner.rank, EvaluationDone(progress["updates_done"], metrics))
    return metrics


def _tell(job: TrainJob, rank: Rank, row: Row) -> Stop | None:
    """Rank 0 sends a row to the driver; every rank learns of a requested stop (collective)."""
    answer: list[Stop | None] = [ray.get(job.channel.put.remote(row)) if rank.index == 0 else None]
    if rank.size > 1:
        dist.broadcast_object_list(answer, src=0)
    return answer[0]


def set_up_process(config: TrainConfig) -> Rank:
    """Threads, TF32 and the current device of this worker's process; who it is in the group."""
    set_float32_precision(config.scaling.precision)
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # DeepSpeed takes it for the number of this worker's card among those that it sees
        os.environ["LOCAL_RANK"] = str(device.index)
    else:
        torch.set_num_threads(config.scaling.num_threads)
    return Rank(context.get_world_rank(), context.get_world_size(), device)


def _build_learner(job: TrainJob, rank: Rank) -> tuple[Learner, dict[str, Any]]:
    """The learner and the run's progress so far."""
    config = job.config
    start = config.init_adapter and folder_here(config.init_adapter, job.copies)
    encoder = load_prompts(job, rank)  # before the policy: a large text encoder and a policy may not fit together
    policy = build_policy(dataclasses.replace(config, init_adapter=start), job.controls).to(rank.device)
    bare = make_learner(job, rank, policy, encoder)
    engine, progress, rows = restore_engine(policy, config, functools.partial(add_noise_floor, bare))
    _tell(job, rank, Started(progress["updates_done"], progress["kl_noise_floor"], rows))
    return dataclasses.replace(bare, engine=engine), progress


def load_prompts(job: TrainJob, rank: Rank) -> TextEncoder:
    """The run's prompts, encoded; the text encoders stay only where they must (`TextEncoder.only`): where labelled images have
    prompts of their own, or there are too many."""
    config = job.config
    encoder = load_backbone(config.base_model, config.base_revision, config.sampler).load_encoder(rank.device)
    if not config.draws_trajectories:
        return encoder
    return encoder.only([*job.prompts, *job.evaluation_prompts])


def make_learner(job: TrainJob, rank: Rank, engine: Any, encoder: TextEncoder) -> Learner:
    """Everything around a policy (in its engine, or bare where it is only sampled) that updates and evaluations need.

    encoder: `load_prompts`.
    """
    config = job.config
    backbone = load_backbone(config.base_model, config.base_revision, config.sampler)
    return Learner(
        config=config,
        engine=engine,
        kernel=backbone.make_kernel(config.sampler),
        encoder=encoder,
        rewards=_rewards(job, rank),
        controls=job.controls,
        prompts=job.prompts,
        evaluation_prompts=job.evaluation_prompts,
        pre_trained_log_probs=job.pre_trained_log_probs,
        rank=rank,
    )


def _rewards(job: TrainJob, rank: Rank) -> Rewards:
    if isinstance(job.rewards, RewardModelSpec):
        return LocalRewards(load_reward_model(dataclasses.replace(job.rewards, device=str(rank.device))))
    return job.rewards.for_worker(rank.index)
