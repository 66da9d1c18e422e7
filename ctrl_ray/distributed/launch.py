"""Stages 2 and 3 from the driver: run the training workers, follow them, take what they leave."""

from __future__ import annotations

import functools
import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, CheckpointConfig, Result, UserCallback

from ctrl_ray.cluster.resources import needed_resources
from ctrl_ray.distributed.checkpoints import ADAPTER_FOLDER
from ctrl_ray.distributed.environment import worker_environment
from ctrl_ray.distributed.rows import Row, Started, Stop, Stopped, Stopping, UpdateDone
from ctrl_ray.distributed.validation import validation_config
from ctrl_ray.distributed.worker import TrainJob, train_worker
from ctrl_ray.distributed.worker_group import WorkerGroup, num_workers, run_workers
from ctrl_ray.errors import RunFolderError
from ctrl_ray.runs.folder import CHECKPOINTS, below

RowHandler = Callable[[Row], None]


@dataclass(frozen=True)
class TrainingResult:
    """What the workers left."""

    best: Checkpoint
    """The checkpoint with the best evaluation; it holds the adapter to export."""
    best_metrics: Mapping[str, Any]
    updates_done: int
    stopped: Stop | None
    """Why it ended before num_updates; None when it did not."""
    kl_noise_floor: float | None = None
    """Nats (`ctrl_ray.evaluation.metric_names`)."""


def run_training(
    job: TrainJob, storage_path: str, run_name: str, on_row: RowHandler, *, callbacks: Sequence[UserCallback] = ()
) -> TrainingResult:
    """Run the Train worker group of a job to its end and return its best checkpoint.

    Resumes by itself from the latest checkpoint under `storage_path`/checkpoints/`run_name`. The first SIGINT or SIGTERM
    asks the workers to leave a checkpoint and return; the second interrupts at once. `on_row` gets every row of the
    channel, `callbacks` (Ray Train's) every report of the workers. Raises the error that a worker raised on purpose,
    ResourceError after `scaling.placement_timeout_s` without room, else Ray's.
    """
    config = job.config
    keep = CheckpointConfig(
        num_to_keep=config.num_checkpoints_to_keep, checkpoint_score_attribute="score", checkpoint_score_order="max"
    )
    follower = _Follower(on_row)
    group = WorkerGroup(
        worker=functools.partial(train_worker, job),
        channel=job.channel,
        scaling=config.scaling,
        num_workers=num_workers(config.scaling),
        storage_path=below(storage_path, CHECKPOINTS),
        run_name=ascii_name(run_name),
        max_failures=config.scaling.max_failures,
        environment=worker_environment(
            use_gpu=config.scaling.use_gpu,
            num_threads=config.scaling.num_threads,
            keeps_graphs=config.estimator.fixed_keep_graphs,
        ),
        asked=needed_resources(config),
        keep=keep,
        validation=validation_config(job) if config.evaluation.asynchronous else None,
        callbacks=callbacks,
    )
    return _trained(run_workers(group, follower), follower)


def ascii_name(name: str) -> str:
    """What Ray Train calls a run, by which it is resumed: Ray names things in ASCII."""
    if name.isascii():
        return name
    plain = "".join(sign if sign.isascii() else "_" for sign in name)
    return f"{plain[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def export_adapter(trained: TrainingResult, folder: Path) -> Path:
    """Copy the best checkpoint's adapter to where the run keeps it."""
    with trained.best.as_directory() as checkpoint:
        shutil.copytree(Path(checkpoint) / ADAPTER_FOLDER, folder, dirs_exist_ok=True)
    return folder


def _trained(result: Result, follower: _Follower) -> TrainingResult:
    candidates = [(checkpoint, metrics) for checkpoint, metrics in result.best_checkpoints or []]
    if not candidates:
        raise RunFolderError("the run left no checkpoint: it was stopped before its first update ended; run it again")
    best, metrics = max(candidates, key=lambda pair: (pair[1]["score"], pair[1]["updates_done"]))
    latest = max(pair[1]["updates_done"] for pair in candidates)
    return TrainingResult(best, metrics, max(latest, follower.updates_done), follower.stopped, follower.kl_noise_floor)


class _Follower:
    """Passes rows on and remembers how far the run came."""

    def __init__(self, on_row: RowHandler) -> None:
        self._on_row = on_row
        self.updates_done = 0
        self.stopped: Stop | None = None
        self.kl_noise_floor: float | None = None

    def __call__(self, row: Row) -> None:
        if isinstance(row, Started):
            self.kl_noise_floor = row.kl_noise_floor
        if isinstance(row, Stopping):  # also where it came too late for the workers: they were at their last update
            self.stopped = Stop("asked", f"{row.signal} received")
        if isinstance(row, Stopped) and (self.stopped is None or self.stopped.kind != "asked"):
            self.stopped = row.stop
        if isinstance(row, UpdateDone):
            self.updates_done = row.update
        self._on_row(row)
