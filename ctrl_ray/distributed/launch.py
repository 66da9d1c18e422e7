"""Launching the training workers from the driver, following them, and taking what they leave."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    UserCallback,
    ValidationConfig,
)
from ray.train.torch import TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ctrl_ray.cluster.waiting import ClusterWait
from ctrl_ray.config import ScalingConfig as OurScalingConfig
from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.channel import MetricsChannel
from ctrl_ray.distributed.checkpoints import ADAPTER_FOLDER
from ctrl_ray.distributed.environment import worker_environment
from ctrl_ray.distributed.rows import Notice, Row, Stop, Stopped, Stopping, UpdateDone
from ctrl_ray.distributed.validation import validation_config
from ctrl_ray.distributed.worker import TrainJob, train_worker
from ctrl_ray.errors import RunFolderError, own_error
from ctrl_ray.runs.folder import CHECKPOINTS, below

_POLL_S = 0.3
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
    follower = _Follower(job.channel, on_row)
    wait = ClusterWait(config, lambda text: on_row(Notice(text)))

    def poll() -> None:
        follower.poll()
        wait.poll()

    validation = validation_config(job) if config.evaluation.asynchronous else None
    result = run_workers(
        functools.partial(train_worker, job),
        config,
        below(storage_path, CHECKPOINTS),
        job.channel,
        poll,
        on_row,
        run_name=run_name,
        keep=keep,
        validation=validation,
        callbacks=callbacks,
    )
    return _trained(result, follower)


def run_workers(
    worker: Callable[[], None],
    config: TrainConfig,
    storage_path: str,
    channel: Any,
    poll: Callable[[], None],
    on_row: RowHandler,
    *,
    run_name: str,
    keep: CheckpointConfig | None = None,
    validation: ValidationConfig | None = None,
    callbacks: Sequence[UserCallback] = (),
) -> Result:
    """Run a worker group of `config.scaling` to its end; `poll` is called while it runs and once after.

    `worker` holds what it needs (functools.partial): what Ray Train gets as train_loop_config is loaded by its controller
    too, which would import torch, diffusers and DeepSpeed for it (7 s) before it starts a worker. The first signal goes to
    the workers through the channel, the second interrupts. Raises the error that a worker raised on purpose, else Ray's.
    """
    _shorten_polling()
    trainer = _trainer(worker, config, storage_path, run_name, keep, validation, callbacks)
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, name="ctrl_ray-fit", daemon=True)
    with _stop_on_signal(channel, on_row):
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            poll()
    poll()
    if (failure := ray.get(channel.failure.remote())) is not None:
        raise failure
    if "error" in outcome:
        raise own_error(outcome["error"]) or outcome["error"]
    result: Result = outcome["result"]
    return result


def export_adapter(trained: TrainingResult, folder: Path) -> Path:
    """Copy the best checkpoint's adapter to where the run keeps it."""
    with trained.best.as_directory() as checkpoint:
        shutil.copytree(Path(checkpoint) / ADAPTER_FOLDER, folder, dirs_exist_ok=True)
    return folder


def new_channel() -> Any:
    """A MetricsChannel on the driver's node."""
    node = ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    actor = ray.remote(MetricsChannel).options(num_cpus=0, scheduling_strategy=strategy)
    return actor.remote()


def _trainer(
    worker: Callable[[], None],
    config: TrainConfig,
    storage_path: str,
    run_name: str,
    keep: CheckpointConfig | None,
    validation: ValidationConfig | None,
    callbacks: Sequence[UserCallback],
) -> TorchTrainer:
    environment = worker_environment(use_gpu=config.scaling.use_gpu, num_threads=config.scaling.num_threads)
    return TorchTrainer(
        worker,
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=num_workers(config.scaling),  # type: ignore[arg-type]
            use_gpu=config.scaling.use_gpu,
            resources_per_worker=config.scaling.worker_resources,
            elastic_resize_monitor_interval_s=config.scaling.resize_check_s,
        ),
        validation_config=validation,
        run_config=RunConfig(
            name=run_name,
            storage_path=storage_path,
            failure_config=FailureConfig(max_failures=config.scaling.max_failures),
            checkpoint_config=keep,
            callbacks=list(callbacks),  # type: ignore[arg-type]
            worker_runtime_env={"env_vars": environment},  # type: ignore[call-arg]
        ),
    )


def num_workers(scaling: OurScalingConfig) -> int | tuple[int, int]:
    """What Ray Train gets: a fixed number of workers, or (fewest, most) of an elastic group."""
    most = scaling.fixed_num_workers
    return most if scaling.min_workers in (None, most) else (scaling.min_workers, most)


def _shorten_polling() -> None:
    """`report()` waits for the controller's poll, 2 s by default."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")


def _trained(result: Result, follower: _Follower) -> TrainingResult:
    candidates = [(checkpoint, metrics) for checkpoint, metrics in result.best_checkpoints or []]
    if not candidates:
        raise RunFolderError("the run left no checkpoint: it was stopped before its first update ended; run it again")
    best, metrics = max(candidates, key=lambda pair: (pair[1]["score"], pair[1]["updates_done"]))
    latest = max(pair[1]["updates_done"] for pair in candidates)
    return TrainingResult(best, metrics, max(latest, follower.updates_done), follower.stopped)


class _Follower:
    """Drains the channel and remembers how far the run came."""

    def __init__(self, channel: Any, on_row: RowHandler) -> None:
        self._channel, self._on_row = channel, on_row
        self.updates_done = 0
        self.stopped: Stop | None = None

    def poll(self) -> None:
        for row in ray.get(self._channel.drain.remote()):
            if isinstance(row, Stopped):
                self.stopped = row.stop
            if isinstance(row, UpdateDone):
                self.updates_done = row.update
            self._on_row(row)


@contextmanager
def _stop_on_signal(channel: Any, on_row: RowHandler) -> Iterator[None]:
    """First SIGINT / SIGTERM: leave a checkpoint. Second: KeyboardInterrupt. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        name = signal.Signals(number).name
        on_row(Stopping(name))
        channel.request_stop.remote(Stop("asked", f"{name} received"))

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
