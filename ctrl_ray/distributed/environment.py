"""What must stand in the environment of a process before torch and DeepSpeed are imported there."""

from __future__ import annotations


def worker_environment(*, use_gpu: bool, num_threads: int) -> dict[str, str]:
    """Of a training worker, a sampling task or an asynchronous evaluation.

    On the CPU DeepSpeed is told to look for no accelerator, and OpenMP takes `num_threads` threads instead of one for
    every core of the machine. A GPU process keeps the defaults: {}.
    """
    return {} if use_gpu else {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(num_threads)}
