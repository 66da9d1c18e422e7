"""The environment of processes that import torch and DeepSpeed."""

from __future__ import annotations

from ctrl_ray.distributed.environment import worker_environment


def test_a_cpu_process_is_told_its_threads_and_a_gpu_process_nothing() -> None:
    assert worker_environment(use_gpu=False, num_threads=3) == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "3"}
    assert worker_environment(use_gpu=True, num_threads=3) == {}
