"""What must stand in the environment of a process before torch and DeepSpeed are imported there."""

from __future__ import annotations


def worker_environment(*, use_gpu: bool, num_threads: int) -> dict[str, str]:
    """Of a training worker, a sampling task or an asynchronous evaluation.

    DeepSpeed is told which kind of device it is for, whatever else the machine has. On the CPU no card is seen (Ray hides
    none from a process that reserves none), and OpenMP takes `num_threads` threads instead of one for every core of the
    machine. On a GPU torch's allocator may grow its segments, which leaves fewer holes.
    """
    if use_gpu:
        return {"DS_ACCELERATOR": "cuda", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    return {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(num_threads)}
