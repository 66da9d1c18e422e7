"""Python's garbage collector, in processes that are ours.

Importing torch, diffusers, transformers and DeepSpeed makes a million objects that stay. At its usual threshold the collector
looks at them again and again: a fifth of the CPU time of the import (5.9 s with it, 4.8 s at ours, medians on one thread of an
AMD EPYC), in every process of a run. No tensor waits for the collector: an update makes no cycle that holds one.
"""

from __future__ import annotations

import gc
import sys

_THRESHOLDS = (50_000, 10, 10)
"""Objects made between two looks at the youngest, and so on; Python's own are (700, 10, 10)."""


def collect_seldom() -> None:
    """From now on in this process."""
    gc.set_threshold(*_THRESHOLDS)


def collect_seldom_in_workers() -> None:
    """If Ray started this process for a task or an actor; a user's own process is left as it is."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():  # to ask for more would start a Ray
        return
    if ray.get_runtime_context().worker.mode == ray.WORKER_MODE:
        collect_seldom()
