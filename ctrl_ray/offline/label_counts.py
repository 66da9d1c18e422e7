"""How many rows of a data set each class has, by the control's column alone; no image is decoded."""

from __future__ import annotations

import math
from collections import Counter
from typing import NamedTuple

from ctrl_ray.config import ControlConfig
from ctrl_ray.offline.plan import ReadPlan, next_batch, open_parquet
from ctrl_ray.offline.schema import RowError, check_label, source_column

_ROWS_PER_READ = 1 << 16


class LabelCounts(NamedTuple):
    """What a control's column holds."""

    rows: list[int]
    """Rows of each class."""
    span: tuple[float, float] | None
    """Smallest and largest number, where thresholds make the classes."""
    num_bad: int
    """Values that make no label."""


def count_labels(plan: ReadPlan, name: str, control: ControlConfig, most: int | None = None) -> LabelCounts:
    """Rows of each class in the first `most` rows (None: all). Values that make no label are counted: reading the rows refuses
    them, or sets them aside. Raises DataError for a damaged file."""
    column, rows, num_bad, num_rows = source_column(name, control), [0] * control.num_classes, 0, 0
    low, high = math.inf, -math.inf
    for file in dict.fromkeys(group.file for group in plan.row_groups):
        with open_parquet(plan.filesystem, file) as parquet:
            batches, first = parquet.iter_batches(_ROWS_PER_READ, columns=[column]), 0
            while (batch := next_batch(batches, file, first)) is not None and (most is None or num_rows < most):
                left = len(batch) if most is None else most - num_rows
                for value, count in Counter(batch.column(0).to_pylist()[:left]).items():
                    try:
                        rows[check_label(name, column, control, value)] += count
                    except RowError:
                        num_bad += count
                        continue
                    if control.thresholds:
                        low, high = min(low, value), max(high, value)
                first, num_rows = first + len(batch), num_rows + len(batch)
    return LabelCounts(rows, (float(low), float(high)) if low <= high else None, num_bad)
