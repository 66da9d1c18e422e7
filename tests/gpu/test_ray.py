"""Whole runs through Ray: on the card, beside a pool on the same card, and on the CPU of a machine that has a card."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

import ctrl_ray
from ctrl_ray.config import ClassifierConfig, RewardPoolConfig, ScalingConfig, TrainConfig
from ctrl_ray.reporting.tracking import read_metrics
from tests.configs import shapes_of_the_paper

Measured = Callable[..., None]
_CONTEXT_MIB = 100
"""A process that takes a card at all takes more than this of its memory."""


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """A Ray of this machine, with its cards; this process itself takes none of them."""
    ray.init(
        address="local",
        num_cpus=6,
        num_gpus=len(_used_mib()),
        object_store_memory=200 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


def small_run(folder: Path, **scaling: Any) -> TrainConfig:
    """Two updates of `shapes` with the paper's adapter, on samples few enough for seconds."""
    shapes = shapes_of_the_paper()
    return dataclasses.replace(
        shapes,
        output_dir=str(folder),
        num_updates=2,
        global_batch_size=16,
        micro_batch_size_per_worker=8,
        checkpoint_every_updates=2,
        evaluation=dataclasses.replace(
            shapes.evaluation,
            every_updates=2,
            num_samples=8,
            final_num_samples=8,
            log_z_samples=8,
            max_log_z_samples=8,
            batch_size=8,
        ),
        rewards=RewardPoolConfig(num_actors=1),
        scaling=ScalingConfig(max_failures=0, placement_timeout_s=60, **scaling),
        export_images=1,
        tracker="none",
    )


def _check(run: ctrl_ray.Run) -> dict[str, Any]:
    """The run is whole, and equal to the pre-trained model at its start; its last update's figures."""
    assert run.adapter is not None and (run.adapter / "pytorch_lora_weights.safetensors").is_file()
    rows = read_metrics(run.folder)
    updates = [row for row in rows if row["kind"] == "update"]
    first = next(row for row in rows if row["kind"] == "evaluation")
    assert [row["update"] for row in updates] == [1, 2] and first["update"] == 0
    assert first["kl"] == 0 and run.summary["before"]["kl"] == 0 and run.summary["after"]["kl"] > 0
    return {name: updates[-1][name] for name in ("update_s", "rollout_s", "backward_s", "samples_per_s")}


def test_shapes_is_trained_on_the_card(tmp_path: Path, device: torch.device, measured: Measured) -> None:
    """All of `fit` but for the classifier, which is shipped: worker on the card, pool on the CPU, evaluations, report."""
    measured(**_check(ctrl_ray.fit(small_run(tmp_path / "run", use_gpu=device.type == "cuda"))))


def test_a_worker_and_the_pool_share_a_card(card: torch.device, tmp_path: Path, measured: Measured) -> None:
    """Where Ray has one card left for the run."""
    config = small_run(tmp_path / "run", use_gpu=True, gpus_per_worker=0.6)
    rewards = RewardPoolConfig(num_actors=2, gpus_per_actor=0.2)
    measured(**_check(ctrl_ray.fit(dataclasses.replace(config, rewards=rewards))))


def test_a_run_on_the_cpu_leaves_the_card_alone(card: torch.device, tmp_path: Path, measured: Measured) -> None:
    """Also what fits a classifier on samples of the pipeline: the card's memory stays as it was, to 100 MiB."""
    config = small_run(tmp_path / "run")
    control = dataclasses.replace(config.controls["jpeg_size"], classifier=None)
    config = dataclasses.replace(
        config,
        controls={"jpeg_size": control},
        num_drawn_images=160,
        classifier=ClassifierConfig(epochs=1, batch_size=32, num_pipeline_samples=8),
    )
    with _most_used() as most:
        _check(ctrl_ray.fit(config))
    measured(mib_more=max(most))
    assert max(most) < _CONTEXT_MIB


@contextmanager
def _most_used() -> Iterator[list[int]]:
    """Of each card: MiB beyond what is taken now, the most within the block."""
    before, ended = _used_mib(), threading.Event()
    most = [0] * len(before)

    def watch() -> None:
        while not ended.wait(0.2):
            for index, used in enumerate(_used_mib()):
                most[index] = max(most[index], used - before[index])

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def _used_mib() -> list[int]:
    """MiB of each card that are taken, by whomever; none where there is no card."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(command, capture_output=True, text=True).stdout.split()]
