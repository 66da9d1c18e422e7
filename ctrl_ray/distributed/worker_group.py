"""Running a Ray Train worker group from the driver: waiting for room, rows, signals, errors, and an end that leaves nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    UserCallback,
    ValidationConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ctrl_ray.cluster.abandoned_groups import give_back_abandoned_groups
from ctrl_ray.cluster.waiting import ClusterWait
from ctrl_ray.config import ScalingConfig as OurScalingConfig
from ctrl_ray.distributed.channel import MetricsChannel
from ctrl_ray.distributed.controller import IntroducesController
from ctrl_ray.distributed.rows import Notice, Stop, Stopping
from ctrl_ray.errors import own_error

_POLL_S = 0.3
_CONTROLLER_STARTS_S = 10.0
"""How long a run that is given up waits for Ray Train's controller, in order to end it."""
_CONTROLLER_ENDS_S = 10.0


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """What Ray Train is asked to run."""

    worker: Callable[[], None]
    """Runs on every worker and holds what it needs (functools.partial): what Ray Train gets as train_loop_config is loaded
    by its controller too, which would import torch, diffusers and DeepSpeed for it (7 s) before it starts a worker."""
    channel: Any
    """MetricsChannel handle (`new_channel`), the one that `worker` has."""
    scaling: OurScalingConfig
    """What a worker reserves, and how long the group waits for room."""
    num_workers: int | tuple[int, int]
    """A fixed number of workers, or (fewest, most) of an elastic group."""
    storage_path: str
    """Where Ray Train keeps what the workers report."""
    run_name: str
    """A run of the same name in the same storage goes on from its latest checkpoint."""
    max_failures: int = 0
    """Restarts after a lost worker."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """What must stand in a worker's environment before torch is imported."""
    asked: Mapping[str, float] | None = None
    """What a message about a wait says the run asks for; None: what the (fewest) workers reserve."""
    keep: CheckpointConfig | None = None
    """Which checkpoints stay; None: all."""
    validation: ValidationConfig | None = None
    """Evaluation of checkpoints beside the workers."""
    callbacks: Sequence[UserCallback] = ()
    """Ray Train's; they live in its controller."""

    @property
    def waits_for(self) -> Mapping[str, float]:
        """`asked`, or what the workers reserve together."""
        if self.asked is not None:
            return self.asked
        fewest = self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]
        return {kind: fewest * amount for kind, amount in self.scaling.worker_resources.items()}


def run_workers(group: WorkerGroup, on_row: Callable[[Any], None]) -> Result:
    """Run a worker group to its end; `on_row` gets every row of its channel, and a `Notice` while it waits for room.

    The first SIGINT or SIGTERM goes to `on_row` as `Stopping` and, if that returns, to the workers through the channel; the
    second one, or one during a wait for room, interrupts. Raises the error that a worker raised on purpose, ResourceError
    after `scaling.placement_timeout_s` without room, else Ray's. Whatever ends it, no worker and no reservation is left.
    """
    _shorten_polling()
    trainer = _trainer(group)
    outcome: dict[str, Any] = {}
    # not Thread.join, which takes a thread for ended when a signal handler raises within it (Python < 3.13)
    ended = threading.Event()

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error
        ended.set()

    def drain() -> None:
        for row in ray.get(group.channel.drain.remote()):
            on_row(row)

    thread = threading.Thread(target=fit, name="ctrl_ray-fit", daemon=True)
    wait = ClusterWait(group.waits_for, group.scaling.placement_timeout_s, lambda text: on_row(Notice(text)))
    with _controller_ends(group.channel, ended), _stop_on_signal(group.channel, on_row, wait):
        thread.start()
        while not ended.wait(_POLL_S):
            drain()
            wait.poll()
    drain()
    if (failure := ray.get(group.channel.failure.remote())) is not None:
        raise failure
    if "error" in outcome:
        raise own_error(outcome["error"]) or outcome["error"]
    result: Result = outcome["result"]
    return result


def new_channel() -> Any:
    """A MetricsChannel on the driver's node."""
    node = ray.get_runtime_context().get_node_id()
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    actor = ray.remote(MetricsChannel).options(num_cpus=0, scheduling_strategy=strategy)
    return actor.remote()


def num_workers(scaling: OurScalingConfig) -> int | tuple[int, int]:
    """Of a training group: a fixed number, or (fewest, most) of an elastic one."""
    most = scaling.fixed_num_workers
    return most if scaling.min_workers in (None, most) else (scaling.min_workers, most)


def process_group_backend(*, use_gpu: bool) -> str:
    """What the workers' process group is made of: objects (a stop, an error) go over the CPU, also between GPU workers."""
    return "cpu:gloo,cuda:nccl" if use_gpu else "gloo"


def _trainer(group: WorkerGroup) -> TorchTrainer:
    return TorchTrainer(
        group.worker,
        torch_config=TorchConfig(backend=process_group_backend(use_gpu=group.scaling.use_gpu)),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=group.num_workers,  # type: ignore[arg-type]
            use_gpu=group.scaling.use_gpu,
            resources_per_worker=group.scaling.worker_resources,
            elastic_resize_monitor_interval_s=group.scaling.resize_check_s,
        ),
        validation_config=group.validation,
        run_config=RunConfig(
            name=group.run_name,
            storage_path=group.storage_path,
            failure_config=FailureConfig(max_failures=group.max_failures),
            checkpoint_config=group.keep,
            callbacks=[*group.callbacks, IntroducesController(group.channel)],  # type: ignore[list-item]
            worker_runtime_env={"env_vars": dict(group.environment)},  # type: ignore[call-arg]
        ),
    )


def _shorten_polling() -> None:
    """`report()` waits for the controller's poll, 2 s by default."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")


@contextmanager
def _stop_on_signal(channel: Any, on_row: Callable[[Any], None], wait: ClusterWait) -> Iterator[None]:
    """First SIGINT / SIGTERM: ask the workers to stop. Second: KeyboardInterrupt. Only in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()

    def handle(number: int, frame: Any) -> None:
        if asked.is_set() or wait.waiting:  # while the group waits there is no worker to ask
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


@contextmanager
def _controller_ends(channel: Any, ended: threading.Event) -> Iterator[None]:
    """Where the run is given up before Ray Train has `ended`, end Ray Train's controller.

    It would try for room for ever, or train on without anybody to follow it, for as long as Ray runs.
    """
    try:
        yield
    finally:
        with suppress(RayError):
            controller = ray.get(channel.take_controller.remote())
            limit = time.monotonic() + _CONTROLLER_STARTS_S
            while controller is None and not ended.is_set() and time.monotonic() < limit:
                time.sleep(_POLL_S)
                controller = ray.get(channel.take_controller.remote())
            if controller is not None and not ended.is_set():
                ray.kill(controller)
                ended.wait(_CONTROLLER_ENDS_S)
                give_back_abandoned_groups()
