"""Rows of each class by the column alone."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrl_ray.config import ControlConfig
from ctrl_ray.offline.label_counts import LabelCounts, count_labels
from ctrl_ray.offline.plan import plan_reading


def counts(folder: Path, parts: list[list[Any]], control: ControlConfig, most: int | None = None) -> LabelCounts:
    for number, values in enumerate(parts):
        pq.write_table(pa.table({"image": [b""] * len(values), "mine": values}), folder / f"{number}.parquet")
    return count_labels(plan_reading(folder, {"mine": control}), "mine", control, most)


def test_numbers_are_counted_between_the_thresholds(tmp_path: Path) -> None:
    """Class i is [t[i-1], t[i]); what is no number is bad."""
    control = ControlConfig(thresholds=(10.0, 20.0))
    found = counts(tmp_path, [[1.0, 10.0, 19.9], [20.0, 25.5, None, float("nan")]], control)
    assert found == LabelCounts([1, 2, 2], (1.0, 25.5), 2)


@pytest.mark.parametrize(
    ("most", "rows", "num_bad"), [(None, [1, 3], 2), (3, [1, 2], 0), (4, [1, 3], 0), (5, [1, 3], 1)]
)
def test_labels_are_counted_over_the_first_rows_of_all_files(
    tmp_path: Path, most: int | None, rows: list[int], num_bad: int
) -> None:
    control = ControlConfig(classes=("no", "yes"))
    assert counts(tmp_path, [[0, 1], [1, 1, -1, 2]], control, most) == LabelCounts(rows, None, num_bad)
