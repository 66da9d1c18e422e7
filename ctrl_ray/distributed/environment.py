"""What must stand in the environment of a process before torch and DeepSpeed are imported there."""

from __future__ import annotations


def worker_environment(*, use_gpu: bool, num_threads: int, keeps_graphs: bool = False) -> dict[str, str]:
    """Of a training worker, a sampling task or an asynchronous evaluation.

    DeepSpeed is told which kind of device it is for, whatever else the machine has. On the CPU no card is seen (Ray hides
    none from a process that reserves none), and OpenMP takes `num_threads` threads instead of one for every core of the
    machine. On a GPU torch's allocator may grow its segments, which leaves fewer holes.
    keeps_graphs: the worker holds so much at a time that glibc would give most of it back after each update, only to be
    handed zeroed pages again (8 % of an update's CPU seconds): it keeps what is freed.
    """
    if use_gpu:
        return {"DS_ACCELERATOR": "cuda", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    kept = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)} if keeps_graphs else {}
    return {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(num_threads), **kept}
