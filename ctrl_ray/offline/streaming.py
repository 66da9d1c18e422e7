"""How this package starts a Ray Data stream: in order, in small blocks, and without progress bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ctrl_ray.ray_internals import quieten_ray_data

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
    quieten_ray_data()
    return stream
