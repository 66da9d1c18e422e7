"""How this package starts a Ray Data stream: in order, in small blocks, and without progress bars."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ray.data

_MAX_TASKS = 256


def start_stream(items: list[dict[str, Any]], *, items_per_task: int, block_bytes: int) -> ray.data.Dataset:
    """A Dataset of small items of work (files, row groups), to be mapped to what they stand for.

    At most 256 tasks, each of about `items_per_task` items or more; a block of the results holds about `block_bytes`.
    The settings are this Dataset's own: the caller's DataContext stays as it is.
    """
    import ray.data

    num_tasks = max(1, min(_MAX_TASKS, len(items) // items_per_task))
    stream = ray.data.from_items(items, override_num_blocks=num_tasks)
    context = stream.context
    context.execution_options.preserve_order = True
    context.target_max_block_size = block_bytes
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    _quieten()
    return stream


def _quieten() -> None:
    """Keep Ray Data's own warnings and errors; drop its start and end notes, and the one that bars are off."""
    logging.getLogger("ray.data._internal.execution.streaming_executor").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
