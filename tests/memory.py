"""Measuring tensor memory in this process: what lives now, and the allocator's own record of what comes and goes."""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def live_storages() -> dict[int, int]:
    """Bytes of every storage that a Python tensor holds now, by the storage's address; views count once."""
    gc.collect()
    found: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


def allocated_peak(run: Callable[[], object]) -> int:
    """Most bytes that were allocated at a time while `run` ran, beyond those before it; torch's CPU allocator reports
    each allocation and each release to the profiler, temporaries inside operations included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    assert events, "the profiler recorded no allocation"
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
