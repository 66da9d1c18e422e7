"""What to try when a card's memory ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ctrl_ray.errors import GpuMemoryError, own_error
from ctrl_ray.planning.planner import memory_advice
from ctrl_ray.planning.preflight import CheckedRun


@contextmanager
def with_remedies(checked: CheckedRun) -> Iterator[None]:
    """Inside, a GpuMemoryError of any process of the run gets what the planner would change, and what a card then needs."""
    try:
        yield
    except Exception as error:
        found = own_error(error)
        if not isinstance(found, GpuMemoryError):
            raise
        raise GpuMemoryError(f"{found}. {memory_advice(checked.config, checked.controls)}") from error
