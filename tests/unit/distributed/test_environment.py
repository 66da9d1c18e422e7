"""The environment of processes that import torch and DeepSpeed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctrl_ray.config import EvaluationConfig, ScalingConfig, TrainConfig
from ctrl_ray.distributed import launch, sampling
from ctrl_ray.distributed.environment import worker_environment
from ctrl_ray.distributed.validation import validation_config
from ctrl_ray.distributed.worker import TrainJob


def test_every_process_is_told_its_kind_of_device() -> None:
    """A CPU process sees no card either, whatever Ray shows it."""
    on_cpu = worker_environment(use_gpu=False, num_threads=3)
    assert on_cpu == {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "3"}
    keeping = worker_environment(use_gpu=False, num_threads=3, keeps_graphs=True)
    assert keeping.items() > on_cpu.items() and set(keeping) - set(on_cpu) == {
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
    }
    on_gpu = worker_environment(use_gpu=True, num_threads=3)
    assert on_gpu["DS_ACCELERATOR"] == "cuda" and "CUDA_VISIBLE_DEVICES" not in on_gpu
    assert on_gpu["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_ray_is_asked_for_it_wherever_a_process_has_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers, sampling tasks and asynchronous evaluations."""
    told: list[Any] = []

    def note(environment: Any) -> Any:
        told.append(environment)
        raise InterruptedError

    config = TrainConfig(
        scaling=ScalingConfig(use_gpu=True, num_workers=1),
        evaluation=EvaluationConfig(asynchronous=True, num_gpus=0.2),
    )
    unused: Any = None
    job = TrainJob(config=config, controls={}, prompts=(), rewards=unused, info=unused, channel=unused)
    told.append(validation_config(job).ray_remote_kwargs["runtime_env"]["env_vars"])
    monkeypatch.setattr(launch, "run_workers", lambda group, on_row: note(group.environment))
    with pytest.raises(InterruptedError):
        launch.run_training(job, "unused", "run", unused)
    task = SimpleNamespace(options=lambda **options: note(options["runtime_env"]["env_vars"]))
    monkeypatch.setattr(sampling.ray, "remote", lambda function: task)
    samples: Any = SimpleNamespace(sample_ids=(0,), adapter=None, draw=None)
    with pytest.raises(InterruptedError):
        sampling.sample_policy(samples, unused, config.scaling)
    assert told == [worker_environment(use_gpu=True, num_threads=1)] * 3


@pytest.mark.full
def test_engines_of_the_tests_are_for_the_cpu_also_where_there_is_a_card() -> None:
    """DeepSpeed would take the card for the whole process."""
    script = (
        "import os, torch; torch.cuda.is_available = lambda: True; import tests.conftest; "
        "print(os.environ['DS_ACCELERATOR'])"
    )
    bare = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=bare, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "cpu", done.stderr
