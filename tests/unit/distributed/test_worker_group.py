"""Following a worker group, with a stand-in for Ray Train: signals, a wait that is too long, errors, and a clean end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch.distributed as dist

from ctrl_ray.config import ScalingConfig
from ctrl_ray.distributed import worker_group
from ctrl_ray.distributed.channel import MetricsChannel
from ctrl_ray.distributed.rows import Notice, Started, Stop, Stopping, UpdateDone
from ctrl_ray.distributed.worker_group import WorkerGroup, process_group_backend, run_workers
from ctrl_ray.errors import DataError, NonFiniteError, ResourceError

_SLEEP_S = 600.0
"""A trainer that nobody ends sleeps longer than any test may take."""


class LocalChannel(MetricsChannel):
    """The channel in this process; `ray.get` is the identity here."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return SimpleNamespace(remote=found) if callable(found) and not name.startswith("_") else found

    @property
    def stop(self) -> Stop | None:
        """What was requested."""
        return self._stop


class Wait:
    """Stands in for ClusterWait: `room` says whether there is room, `too_long` whether the wait has lasted too long."""

    room, too_long = True, False

    def __init__(self, *_: Any) -> None: ...

    @property
    def waiting(self) -> bool:
        return not self.room

    def poll(self) -> None:
        if self.too_long:
            raise ResourceError("no room")


class Trainer:
    """Stands in for Ray Train: `fit` runs `work`; whoever kills the controller ends its sleep."""

    def __init__(self, channel: LocalChannel) -> None:
        self.channel, self.killed = channel, threading.Event()
        self.work: Callable[[], Any] = self.sleep
        self.thread: threading.Thread | None = None

    def fit(self) -> Any:
        self.thread = threading.current_thread()
        self.channel.introduce_controller.remote(self)  # type: ignore[attr-defined]
        return self.work()

    def sleep(self) -> None:
        if self.killed.wait(_SLEEP_S):
            raise RuntimeError("the controller died")


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch) -> Trainer:
    trainer = Trainer(LocalChannel())
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(ray, "kill", lambda controller: controller.killed.set())
    monkeypatch.setattr(worker_group, "_trainer", lambda group: trainer)
    monkeypatch.setattr(worker_group, "give_back_abandoned_groups", lambda: 0)
    monkeypatch.setattr(worker_group, "ClusterWait", type("Wait", (Wait,), {}))
    monkeypatch.setattr(worker_group, "_POLL_S", 0.01)
    return trainer


def _run(trainer: Trainer, on_row: Callable[[Any], None] = lambda row: None) -> Any:
    group = WorkerGroup(
        worker=lambda: None,
        channel=trainer.channel,
        scaling=ScalingConfig(),
        num_workers=1,
        storage_path="",
        run_name="",
    )
    return run_workers(group, on_row)


def _put(trainer: Trainer, row: Any) -> None:
    trainer.channel.put.remote(row)  # type: ignore[attr-defined]


def _signal(number: int) -> None:
    os.kill(os.getpid(), number)


def test_rows_arrive_in_order_and_the_result_comes_back(trainer: Trainer) -> None:
    """Also those of the last moment, after the last look."""
    rows: list[Any] = []

    def work() -> str:
        for row in (Started(0), UpdateDone(1, {}), UpdateDone(2, {})):
            _put(trainer, row)
        return "the result"

    trainer.work = work
    assert _run(trainer, rows.append) == "the result"
    assert rows == [Started(0), UpdateDone(1, {}), UpdateDone(2, {})]
    assert not trainer.killed.is_set()
    assert trainer.channel.take_controller.remote() is None, "two actors that hold each other would never end"  # type: ignore[attr-defined]


def test_a_wait_that_is_too_long_ends_the_run_at_once(trainer: Trainer) -> None:
    """And Ray Train's controller with it, which would try for room for ever."""
    worker_group.ClusterWait.too_long = True  # type: ignore[attr-defined]
    with pytest.raises(ResourceError, match="no room"):
        _run(trainer)
    assert trainer.killed.is_set()
    assert trainer.thread is not None and trainer.thread.daemon


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(trainer: Trainer, number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    rows: list[Any] = []

    def work() -> None:
        _signal(number)
        while trainer.channel.stop is None:
            assert not trainer.killed.wait(0.01)
        _signal(number)
        trainer.sleep()

    trainer.work = work
    with pytest.raises(KeyboardInterrupt):
        _run(trainer, rows.append)
    assert rows == [Stopping(number.name)]
    assert trainer.channel.stop == Stop("asked", f"{number.name} received")
    assert trainer.killed.is_set()
    assert before == [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]


def test_workers_that_stop_when_asked_give_their_result(trainer: Trainer) -> None:
    def work() -> str:
        _signal(signal.SIGINT)
        while trainer.channel.stop is None:
            assert not trainer.killed.wait(0.01)
        return "a checkpoint"

    trainer.work = work
    assert _run(trainer) == "a checkpoint"


def test_a_signal_during_a_wait_for_room_interrupts(trainer: Trainer) -> None:
    """No worker is there to leave anything."""
    rows: list[Any] = []

    def work() -> None:
        _signal(signal.SIGINT)
        trainer.sleep()

    trainer.work = work
    worker_group.ClusterWait.room = False  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        _run(trainer, rows.append)
    assert rows == [] and trainer.killed.is_set()


def test_a_signal_that_the_driver_answers_itself_is_not_sent_on(trainer: Trainer) -> None:
    """Stage 1 has nothing to leave: it raises at the first one."""

    def on_row(row: Any) -> None:
        raise KeyboardInterrupt if isinstance(row, Stopping) else AssertionError(row)

    def work() -> None:
        _signal(signal.SIGINT)
        trainer.sleep()

    trainer.work = work
    with pytest.raises(KeyboardInterrupt):
        _run(trainer, on_row)
    assert trainer.channel.stop is None and trainer.killed.is_set()


def test_an_error_that_a_worker_raised_on_purpose_is_raised(trainer: Trainer) -> None:
    """The one that was left with the channel before the one that Ray Train wraps."""
    wrapped = RuntimeError("Ray's")
    wrapped.__cause__ = DataError("a bad row")

    def work() -> None:
        raise wrapped

    trainer.work = work
    with pytest.raises(DataError, match="a bad row"):
        _run(trainer)
    trainer.channel.fail.remote(NonFiniteError("not finite"))  # type: ignore[attr-defined]
    with pytest.raises(NonFiniteError):
        _run(trainer)


def test_other_errors_stay_as_they_are(trainer: Trainer) -> None:
    def work() -> None:
        raise RuntimeError("Ray's")

    trainer.work = work
    with pytest.raises(RuntimeError, match="Ray's"):
        _run(trainer)


def test_objects_between_gpu_workers_go_over_the_cpu() -> None:
    """NCCL serves CUDA tensors alone; torch itself reads the name."""
    backends = dist.distributed_c10d.BackendConfig(process_group_backend(use_gpu=True)).get_device_backend_map()
    assert backends == {"cpu": "gloo", "cuda": "nccl"}
    assert process_group_backend(use_gpu=False) == "gloo"
    channel = MetricsChannel()
    group = WorkerGroup(
        worker=lambda: None,
        channel=channel,
        scaling=ScalingConfig(use_gpu=True),
        num_workers=2,
        storage_path="/tmp",
        run_name="run",
    )
    assert worker_group._trainer(group).backend_config.backend == process_group_backend(use_gpu=True)


def test_what_a_wait_says_is_asked_for() -> None:
    """By hand: the fewest workers of an elastic group, two CPUs and a GPU each."""
    scaling = ScalingConfig(cpus_per_worker=2, use_gpu=True)

    def group(workers: Any, **more: Any) -> WorkerGroup:
        return WorkerGroup(
            worker=lambda: None,
            channel=None,
            scaling=scaling,
            num_workers=workers,
            storage_path="",
            run_name="",
            **more,
        )

    assert group(3).waits_for == {"CPU": 6, "GPU": 3}
    assert group((2, 5)).waits_for == {"CPU": 4, "GPU": 2}
    assert group(3, asked={"CPU": 7}).waits_for == {"CPU": 7}


def test_a_wait_is_told_to_the_driver(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = []

    class Says(Wait):
        def __init__(self, asked: Any, limit: float, say: Callable[[str], None]) -> None:
            assert (asked, limit) == ({"CPU": 1.0}, ScalingConfig().placement_timeout_s)
            say("waiting for machines")

    monkeypatch.setattr(worker_group, "ClusterWait", Says)
    trainer.work = lambda: None
    _run(trainer, rows.append)
    assert rows == [Notice("waiting for machines")]
