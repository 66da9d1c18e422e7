"""Evaluation beside training: Ray Train's asynchronous validation of a checkpoint, in a Ray task of its own."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.train import Checkpoint, ValidationConfig

from ctrl_ray.distributed.batches import Batch
from ctrl_ray.distributed.checkpoints import ADAPTER_FOLDER, PROGRESS_FILE
from ctrl_ray.distributed.environment import worker_environment
from ctrl_ray.distributed.evaluate import evaluate_policy
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.distributed.rows import EvaluationDone, Notice, Row, SamplesDrawn, Stop
from ctrl_ray.distributed.scores import UNSCORED, evaluation_score, exceeds_target_kl, told_with_checkpoint
from ctrl_ray.distributed.worker import TrainJob, load_prompts, make_learner
from ctrl_ray.errors import GpuMemoryError, naming_memory
from ctrl_ray.evaluation.samples import caption
from ctrl_ray.policy.adapter import load_into_policy
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.precision import set_float32_precision


def validation_config(job: TrainJob) -> ValidationConfig:
    """What the trainer gets: `validate_checkpoint` on the resources that `evaluation` asks for."""
    beside = job.config.evaluation
    threads = max(1, math.ceil(beside.num_cpus))
    environment = worker_environment(use_gpu=beside.num_gpus > 0, num_threads=threads)
    return ValidationConfig(
        fn=functools.partial(validate_checkpoint, job=job),
        ray_remote_kwargs={
            "num_cpus": beside.num_cpus,
            "num_gpus": beside.num_gpus,
            "max_retries": job.config.scaling.max_failures,
            "runtime_env": {"env_vars": environment},
        },
    )


def validate_checkpoint(checkpoint: Checkpoint, *, job: TrainJob) -> dict[str, Any]:
    """Evaluate a checkpoint as the workers would; tell the driver, who logs it at the checkpoint's update.

    Returns 'score', by which Ray Train chooses the best checkpoint, with the figures behind it. The run is asked to stop
    where the KL exceeds target_kl. A failed evaluation is told to the driver too; training goes on without it, unless it
    was for want of GPU memory, which the next one would lack too: that ends the run.
    """
    set_float32_precision(job.config.scaling.precision)
    with checkpoint.as_directory() as folder:
        update = int(json.loads((Path(folder) / PROGRESS_FILE).read_text(encoding="utf-8"))["updates_done"])
        try:
            with naming_memory(f"the asynchronous evaluation after update {update}"):
                learner = _learner(job, Path(folder) / ADAPTER_FOLDER)
                samples = _Samples(job)
                metrics = evaluate_policy(learner, job.config.evaluation.num_samples, samples)
        except GpuMemoryError as error:
            ray.get(job.channel.fail.remote(error))
            ray.get(job.channel.request_stop.remote(Stop("failed", str(error))))
            raise
        except Exception as error:
            text = f"the evaluation after update {update} failed ({type(error).__name__}: {error}); training goes on"
            _tell(job, Notice(text))
            raise
    _tell(job, EvaluationDone(update, metrics))
    _tell(job, SamplesDrawn(update, samples.images, samples.captions))
    stop = exceeds_target_kl(job.config, metrics)
    if stop is not None:
        ray.get(job.channel.request_stop.remote(stop))
    # the pre-trained model is no candidate for the best adapter
    return {"score": evaluation_score(metrics, job.config) if update else UNSCORED, **told_with_checkpoint(metrics)}


class _Samples:
    """Keeps the first `export_images` samples of each combination of classes."""

    def __init__(self, job: TrainJob) -> None:
        self._controls = list(job.config.controls)
        self._per_class = job.config.export_images
        self._counts: dict[tuple[int, ...], int] = {}
        self.images: list[np.ndarray] = []
        self.captions: list[str] = []

    def __call__(self, batch: Batch, images: np.ndarray) -> None:
        columns = len(self._controls)
        for prompt, row, image in zip(batch.prompts, batch.labels[:, :columns].tolist(), images, strict=True):
            asked = tuple(row)
            self._counts[asked] = self._counts.get(asked, 0) + 1
            if self._counts[asked] <= self._per_class:
                self.images.append(np.array(image))
                self.captions.append(caption(prompt, self._controls, row))


def _learner(job: TrainJob, adapter: Path) -> Learner:
    """A learner that only samples: the adapter's policy in the place of the engine. For so few calls nothing is compiled."""
    config = dataclasses.replace(
        job.config, init_adapter=None, scaling=dataclasses.replace(job.config.scaling, compile=False)
    )
    rank = Rank(0, 1, torch.device("cuda" if config.evaluation.num_gpus else "cpu"))
    encoder = load_prompts(job, rank)
    policy = build_policy(config, job.controls)
    load_into_policy(adapter, policy)
    return make_learner(dataclasses.replace(job, config=config), rank, policy.to(rank.device).eval(), encoder)


def _tell(job: TrainJob, row: Row) -> None:
    ray.get(job.channel.put.remote(row))
