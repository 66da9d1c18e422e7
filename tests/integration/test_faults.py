"""What breaks on clusters, made to happen: a killed worker, a full disk, a NaN, a killed driver. Whatever it was, the run ends
with the adapter and the moments that it would have had."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor

from ctrl_ray.config import SamplerConfig, TrainConfig
from ctrl_ray.config.json import to_json
from ctrl_ray.distributed.batches import training_batch
from ctrl_ray.distributed.checkpoints import read_checkpoint
from ctrl_ray.distributed.launch import TrainingResult, export_adapter, run_training
from ctrl_ray.distributed.rows import Notice, Row, Started, UpdateDone
from ctrl_ray.driver.stages import rewards_of, train_job
from ctrl_ray.errors import CheckpointError, NonFiniteError
from ctrl_ray.planning.preflight import preflight
from ctrl_ray.reporting.tracking import read_metrics
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.local import LocalPendingRewards
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.rewards.protocol import PendingRewards
from tests.clusters import ROOT
from tests.integration.elastic import read_rows
from tests.integration.faulty import Faulty
from tests.registered import registered_updates

pytestmark = pytest.mark.usefixtures("ray_session")
Rows = list[Row]


@pytest.fixture(scope="module")
def config(base_config: TrainConfig) -> TrainConfig:
    """Two workers, six updates of two micro-batches, a checkpoint after every second one, evaluated at the end only."""
    return dataclasses.replace(
        base_config,
        micro_batch_size_per_worker=2,
        checkpoint_every_updates=2,
        num_checkpoints_to_keep=2,
        sampler=SamplerConfig(num_steps=2),
        evaluation=dataclasses.replace(base_config.evaluation, every_updates=0),
        scaling=dataclasses.replace(base_config.scaling, num_workers=2, cpus_per_worker=0.5, threads_per_worker=1),
    )


@pytest.fixture(scope="module")
def pool(config: TrainConfig) -> Iterator[PooledRewards]:
    """One for all: it outlives what happens to the workers."""
    with rewards_of(config) as rewards:
        assert isinstance(rewards, PooledRewards)
        yield rewards


@pytest.fixture(scope="module")
def whole(config: TrainConfig, pool: PooledRewards, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What a run to which nothing happens leaves."""
    folder = tmp_path_factory.mktemp("whole")
    trained, _ = _train(config, folder, pool)
    return _left(trained, folder)


def _left(trained: TrainingResult, folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors and the last checkpoint's."""
    state, _ = read_checkpoint(_checkpoints(folder)[-1])
    adapter = _tensors(export_adapter(trained, folder / "adapter"))
    return adapter | {f"state {key}": value for key, value in state.items()}


def _tensors(adapter: Path) -> dict[str, Tensor]:
    return {name: value for file in adapter.glob("*.safetensors") for name, value in load_file(file).items()}


def _check_equal(left: dict[str, Tensor], whole: dict[str, Tensor], what: str) -> None:
    assert left.keys() == whole.keys() and len(whole) > 5
    for key, value in whole.items():
        assert torch.equal(value, left[key]), f"{key}: {what}"


def _train(
    config: TrainConfig, folder: Path, rewards: Any, on_update: Callable[[int], None] = lambda update: None
) -> tuple[TrainingResult, Rows]:
    """Stages 2 and 3 with checkpoints under a folder; on_update(updates done) is called after each one."""
    rows: Rows = []

    def on_row(row: Row) -> None:
        rows.append(row)
        if isinstance(row, UpdateDone):
            on_update(row.update)

    return run_training(train_job(preflight(config), rewards), str(folder), "run", on_row), rows


def _local(config: TrainConfig) -> TrainConfig:
    """Rewards in the workers."""
    return dataclasses.replace(config, rewards=dataclasses.replace(config.rewards, num_actors=0))


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "checkpoints" / "run").glob("checkpoint_*") if path.is_dir())


def _updates_done(folder: Path) -> list[int]:
    """Of every checkpoint whose progress is written."""
    files = (folder / "checkpoints").glob("*/checkpoint_*/progress.json")
    with contextlib.suppress(OSError, json.JSONDecodeError):  # being written or removed
        return sorted(json.loads(file.read_text())["updates_done"] for file in files)
    return []


def _kill_once(marker: Path) -> Callable[[PendingRewards], PendingRewards]:
    def fault(pending: PendingRewards) -> PendingRewards:
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return pending

    return fault


def _poison(folder: Path, registered: int) -> Callable[[PendingRewards], PendingRewards]:
    """A NaN in the cotangent, once Ray Train has registered the checkpoint after so many updates."""

    def fault(pending: PendingRewards) -> PendingRewards:
        deadline = time.monotonic() + 120
        while registered not in registered_updates(folder):
            assert time.monotonic() < deadline, f"the checkpoint after {registered} updates was not registered"
            time.sleep(0.05)
        rewarded = pending.result()
        assert rewarded.cotangent is not None
        rewarded.cotangent[0, 0, 0, 0] = float("nan")
        return LocalPendingRewards(lambda: rewarded)

    return fault


def _fill_once(disk: Path) -> Callable[[PendingRewards], PendingRewards]:
    def fault(pending: PendingRewards) -> PendingRewards:
        deadline = time.monotonic() + 120
        # Ray Train removes the first of three checkpoints once the third one is registered
        while _updates_done(disk) != [2, 3]:
            assert time.monotonic() < deadline, _updates_done(disk)
            time.sleep(0.05)
        with (disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        return pending

    return fault


@pytest.mark.full
def test_a_worker_killed_at_a_random_update_changes_no_bit(
    config: TrainConfig, pool: PooledRewards, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    """SIGKILL: the run goes on from the last checkpoint by itself, to the very adapter and moments it would have had."""
    rank, request = random.SystemRandom().randrange(2), random.SystemRandom().randrange(2 * config.num_updates)
    print(f"worker {rank} is killed at its request {request}")
    config = dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, max_failures=1))
    marker = tmp_path / "it_was_killed"
    trained, rows = _train(config, tmp_path, Faulty(pool, rank, request, _kill_once(marker)))
    assert marker.exists() and trained.updates_done == config.num_updates
    fatal = request // 2  # updates done when the worker died
    starts = [row.update for row in rows if isinstance(row, Started)]
    assert starts[0] == 0 and len(starts) == 2 and starts[1] % 2 == 0 and starts[1] <= fatal, (fatal, starts)
    _check_equal(_left(trained, tmp_path), whole, f"worker {rank} killed at its request {request}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "ctrl_ray_test", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.full
def test_a_full_disk_and_then_a_nan_leave_the_last_good_checkpoint(
    config: TrainConfig, pool: PooledRewards, whole: dict[str, Tensor], small_disk: Path
) -> None:
    """Clear errors, no half-written checkpoint, nothing tried again in vain; the run goes on each time, to its very end."""
    config = dataclasses.replace(config, checkpoint_every_updates=1)
    hopeful = dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, max_failures=3))
    filler = small_disk / "filler"
    updates: list[int] = []
    with pytest.raises(CheckpointError, match=r"could not be written to .*[Nn]o space left.*--resume"):
        _train(hopeful, small_disk, Faulty(pool, rank=0, request=2 * 3, fault=_fill_once(small_disk)))
    assert filler.exists()
    _check_last_good(small_disk, 3)
    filler.unlink()

    # After update 3, so many requests into the next process: the second micro-batch of update 4, which counts from 0.
    poisoned = Faulty(pool, rank=1, request=2 * 1 + 1, fault=_poison(small_disk, 4))
    with pytest.raises(NonFiniteError, match="update 4, micro-batch 1 on rank 1"):
        _train(hopeful, small_disk, poisoned, updates.append)
    assert updates == [4]  # the next update was not made, and none was made again
    _check_last_good(small_disk, 4)

    trained, rows = _train(config, small_disk, pool)
    assert [row.update for row in rows if isinstance(row, Started)] == [4]
    assert trained.updates_done == 6
    _check_equal(_left(trained, small_disk), whole, "after a full disk and a NaN")


def _check_last_good(folder: Path, updates: int) -> None:
    state, progress = read_checkpoint(_checkpoints(folder)[-1])
    assert progress["updates_done"] == int(state["step"]) == updates
    assert all(bool(torch.isfinite(value).all()) for value in state.values())


@pytest.mark.slow
def test_a_killed_driver_is_resumed(config: TrainConfig, whole: dict[str, Tensor], tmp_path: Path) -> None:
    """SIGKILL of the command on a Ray that goes on: the same command with --resume does the rest."""
    folder = tmp_path / "run"
    file = tmp_path / "config.json"
    file.write_text(to_json(dataclasses.replace(config, output_dir=str(folder))))
    command = [sys.executable, "-m", "ctrl_ray.train", "--config", str(file)]
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(command, start_new_session=True, env=environment)
    deadline = time.monotonic() + 300
    while not any(row["kind"] == "update" and row["update"] >= 4 for row in _rows(folder)):
        assert first.poll() is None and time.monotonic() < deadline, "the run ended or hangs before its fourth update"
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    subprocess.run([*command, "--resume"], check=True, timeout=300, env=environment)
    updates = [row["update"] for row in read_metrics(folder) if row["kind"] == "update"]
    assert updates == [1, 2, 3, 4, 5, 6]
    adapter = _tensors(folder / "adapter")
    _check_equal(adapter, {name: value for name, value in whole.items() if name in adapter}, "after a killed driver")
    assert (folder / "adapter" / "adapter.json").is_file() and (folder / "report" / "report.html").is_file()


def _rows(folder: Path) -> list[dict[str, Any]]:
    return read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []


@pytest.mark.slow
def test_a_lost_node_shrinks_the_group_and_its_return_grows_it(config: TrainConfig, tmp_path: Path) -> None:
    """Two workers, one, two again: in every update the same eight samples, and the losses of a fixed group."""
    config = dataclasses.replace(
        _local(config),
        num_updates=8,
        checkpoint_every_updates=1,
        scaling=dataclasses.replace(config.scaling, cpus_per_worker=1.0, max_failures=3),
    )
    _, rows = _train(config, tmp_path / "fixed", _spec(config))
    losses = [row.metrics["loss"] for row in rows if isinstance(row, UpdateDone)]
    folder = tmp_path / "elastic"
    rows = _run_on_two_nodes("lost", config, folder)
    last = {row.update: row.metrics["loss"] for row in rows if isinstance(row, UpdateDone)}
    assert [last[update] for update in range(1, 9)] == pytest.approx(losses, rel=1e-4)
    starts = [row.update for row in rows if isinstance(row, Started)]
    assert starts[0] == 0 and all(2 <= update <= 5 for update in starts[1:]), starts
    seen: dict[tuple[int, int], set[str]] = {}
    for line in (folder / "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        seen.setdefault((row["update"], row["workers"]), set()).update(map(json.dumps, row["samples"]))
    plan = preflight(config)
    for update, workers in ((0, 2), (1, 2), (2, 2), (4, 1), (6, 2), (7, 2)):
        batch = training_batch(
            config.seed,
            update,
            range(config.global_batch_size),
            plan.prompts,
            plan.controls,
            tuple(config.controls),
            config.fixed_control_dropout,
        )
        samples = zip(batch.prompts, batch.labels.tolist(), strict=True)
        assert seen[update, workers] == {json.dumps(sample) for sample in samples}, (update, workers)


@pytest.mark.slow
def test_a_spot_notice_leaves_a_checkpoint_before_the_node_goes(config: TrainConfig, tmp_path: Path) -> None:
    """No checkpoint was due; the smaller group goes on with the update after the one in which the notice came."""
    config = dataclasses.replace(
        _local(config),
        checkpoint_every_updates=100,
        scaling=dataclasses.replace(config.scaling, cpus_per_worker=1.0, max_failures=0),
    )
    rows = _run_on_two_nodes("spot", config, tmp_path / "run")
    assert [row.update for row in rows if isinstance(row, Started)] == [0, 3]
    (notice,) = [row.text for row in rows if isinstance(row, Notice) and "taken away" in row.text]
    assert re.fullmatch(r"node \w{8} will be taken away: left a checkpoint after update 3", notice)
    assert [row.update for row in rows if isinstance(row, UpdateDone)] == [1, 2, 3, 4, 5, 6]


def _run_on_two_nodes(scenario: str, config: TrainConfig, folder: Path) -> Rows:
    """What the workers of an elastic group on a cluster of two nodes told."""
    folder.mkdir()
    elastic = dataclasses.replace(config.scaling, min_workers=1, resize_check_s=3.0)
    file = folder / "config.json"
    file.write_text(to_json(dataclasses.replace(config, scaling=elastic)))
    quick = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.3",
        "RAY_health_check_initial_delay_ms": "2000",
        "RAY_health_check_period_ms": "1000",
        "RAY_health_check_timeout_ms": "2000",
        "RAY_health_check_failure_threshold": "3",
    }
    command = [sys.executable, "-m", "tests.integration.elastic", scenario, str(file), str(folder)]
    subprocess.run(command, check=True, timeout=500, env=os.environ | quick)
    return read_rows(folder)


def _spec(config: TrainConfig) -> RewardModelSpec:
    with rewards_of(_local(config)) as spec:
        assert isinstance(spec, RewardModelSpec)
        return spec
