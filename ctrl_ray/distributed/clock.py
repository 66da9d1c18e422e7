"""Where the time of an update goes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class PhaseClock:
    """Seconds by phase of an update. On a GPU they are told by events in its stream: the host runs ahead of it, and would
    see launches, not work; nothing waits for the GPU before the update has ended."""

    def __init__(self, device: torch.device) -> None:
        self._mark: Callable[[], Any] = time.perf_counter
        if device.type == "cuda":
            self._mark = lambda: torch.cuda.current_stream(device).record_event(torch.cuda.Event(enable_timing=True))
        self._start = self._mark()
        self._phases: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """What runs inside belongs to the phase."""
        start = self._mark()
        yield
        self._phases.append((phase, start, self._mark()))

    def seconds(self) -> dict[str, float]:
        """Of each phase that there was, and 'update_s' until now."""
        end = self._mark()
        found = {"update_s": _seconds(self._start, end)}
        for phase, start, stop in self._phases:
            found[phase] = found.get(phase, 0.0) + _seconds(start, stop)
        return found


def _seconds(start: Any, end: Any) -> float:
    """Between two marks: of the host's clock, or events of a GPU."""
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000
