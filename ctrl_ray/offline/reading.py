"""Reading the offline data set: as a Ray Dataset that streams, or row by row without Ray. One validation for both.

    dataset = open_dataset("data.parquet", {"jpeg_size": ControlConfig(thresholds=(1500, 1700, 1900))})
    for batch in dataset.iter_batches(batch_size=64): ...

Row groups of the Parquet files are the unit of work: a task reads one, batch by batch, so that neither a file nor the
set has to fit in memory. Rows keep their order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import DataError
from ctrl_ray.offline.plan import ReadPlan, RowGroup, open_parquet, plan_reading
from ctrl_ray.offline.schema import (
    IMAGE,
    PROMPT,
    BadRow,
    check_on_bad_row,
    handle_bad_rows,
    value_column,
)
from ctrl_ray.offline.storage import list_files
from ctrl_ray.offline.streaming import start_stream

if TYPE_CHECKING:
    import ray.data

OnBadRow = Literal["error", "skip"]
"""'error': the first bad row raises DataError; 'skip': bad rows are left out and written to a side file."""

_BATCH_BYTES = 16 * 2**20
_BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """What the check of a data set found."""

    num_rows: int
    """Good rows."""
    num_bad_rows: int
    """Rows that were set aside."""
    image_size: tuple[int, int]
    """(height, width) of every image as read."""
    has_prompts: bool
    """Whether there is a prompt column."""
    class_counts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Good rows of each class, per control whose column is there."""


def iter_rows(
    path: str | Path,
    controls: Mapping[str, ControlConfig],
    on_bad_row: OnBadRow = "error",
    *,
    image_size: tuple[int, int] | None = None,
    columns_required: bool = True,
    bad_rows_file: str | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of `open_dataset`, one by one, without Ray; a bad row raises when it is reached.

    Under 'skip' the side file is written, and the number of bad rows logged, when the last row has been read.
    """
    check_on_bad_row(on_bad_row)
    plan = plan_reading(path, controls, image_size=image_size, columns_required=columns_required)
    return _iter_plan(plan, on_bad_row, bad_rows_file or side_file(path), str(path))


def _iter_plan(plan: ReadPlan, on_bad_row: OnBadRow, bad_rows_file: str, source: str) -> Iterator[dict[str, Any]]:
    bad_rows: list[BadRow] = []
    for group in plan.row_groups:
        for row in plan.rows(group):
            if not isinstance(row, BadRow):
                yield row
            elif on_bad_row == "error":
                raise DataError(str(row))
            else:
                bad_rows.append(row)
    handle_bad_rows(bad_rows, plan.num_rows, on_bad_row, bad_rows_file, source=source)


def open_dataset(
    path: str | Path,
    controls: Mapping[str, ControlConfig],
    *,
    on_bad_row: OnBadRow = "error",
    image_size: tuple[int, int] | None = None,
    columns_required: bool = True,
    bad_rows_file: str | None = None,
    cpus_per_task: float = 1.0,
) -> ray.data.Dataset:
    """A checked data set that streams.

    path: a Parquet file, or a folder of them, local or any URI that pyarrow.fs opens. image_size (height, width):
    scale every image to cover it and crop around the centre; None: all must have the size of the first one.
    columns_required: whether every control's column must be there (false: the missing ones are left out of the rows).
    bad_rows_file: where 'skip' writes the bad rows; None: `<path>.bad_rows.jsonl`. cpus_per_task: CPUs that Ray
    reserves for a reading task; lower it where the training workers have taken all of them.

    Rows: `image` uint8 (H, W, 3), `prompt` str ("" without the column), per control int64 class, and where its column
    holds a number `<control>_value` float64. The labels are those of the stored image: when image_size changes an
    image, measure them again, or label with the same size.

    One pass over the set comes first, so that a bad row stops the run before training and not within it. Raises what
    `plan_reading` raises, and DataError for a bad row ('error') or when no row is left ('skip').
    """
    return open_checked(
        path,
        controls,
        on_bad_row=on_bad_row,
        image_size=image_size,
        columns_required=columns_required,
        bad_rows_file=bad_rows_file,
        cpus_per_task=cpus_per_task,
    )[0]


def open_checked(
    path: str | Path,
    controls: Mapping[str, ControlConfig],
    *,
    on_bad_row: OnBadRow = "error",
    image_size: tuple[int, int] | None = None,
    columns_required: bool = True,
    bad_rows_file: str | None = None,
    cpus_per_task: float = 1.0,
) -> tuple[ray.data.Dataset, DataSummary]:
    """`open_dataset`, with what its first pass counted."""
    check_on_bad_row(on_bad_row)
    plan = plan_reading(path, controls, image_size=image_size, columns_required=columns_required)
    bad_rows: list[BadRow] = []
    counts = {name: np.zeros(control.num_classes, dtype=np.int64) for name, control in plan.controls.items()}
    checked = _stream(plan).map_batches(_Check(plan), batch_size=None, num_cpus=cpus_per_task)
    for found in checked.iter_rows():
        if found["damage"]:
            raise DataError(found["damage"])
        bad_rows += [BadRow(*bad) for bad in json.loads(found["bad_rows"])]
        for name, group_counts in json.loads(found["class_counts"]).items():
            counts[name] += group_counts
    handle_bad_rows(
        bad_rows, plan.num_rows, on_bad_row, bad_rows_file or side_file(path), source=str(path)
    )  # fmt: skip
    summary = DataSummary(
        num_rows=plan.num_rows - len(bad_rows),
        num_bad_rows=len(bad_rows),
        image_size=plan.expected_size or (0, 0),
        has_prompts=PROMPT in plan.columns,
        class_counts={name: tuple(int(count) for count in values) for name, values in counts.items()},
    )
    skipped = frozenset((bad.file, bad.row) for bad in bad_rows)
    return _stream(plan).map_batches(_Read(plan, skipped), batch_size=None, num_cpus=cpus_per_task), summary


def read_prompts_column(path: str | Path) -> tuple[str, ...]:
    """The distinct prompts of a data set, in the order in which they first occur; images are not read.

    Raises DataError when there is no prompt column, or a row without a prompt.
    """
    filesystem, files = list_files(path, (".parquet",), "a Parquet file or a folder of .parquet files")
    prompts: dict[str, None] = {}
    for file in files:
        with open_parquet(filesystem, file) as parquet:
            if PROMPT not in parquet.schema_arrow.names:
                raise DataError(
                    f"{file}, every row: column {PROMPT!r} is missing; the file has {parquet.schema_arrow.names}; "
                    "label again with --prompts or --prompts-file, or give the prompts in a text file (prompts_file)"
                )
            row = 0
            for batch in parquet.iter_batches(4096, columns=[PROMPT]):
                for prompt in batch.column(0).to_pylist():
                    if prompt is None:
                        raise DataError(f"{BadRow(file, row, 'prompt is missing; expected a string; fill it in')}")
                    prompts[prompt] = None
                    row += 1
    handle_bad_rows([], len(prompts), "error", "", source=str(path))
    return tuple(prompts)


def side_file(path: str | Path) -> str:
    """Where the bad rows of `path` are set aside unless the caller says otherwise."""
    return f"{str(path).rstrip('/')}.bad_rows.jsonl"


class _Check:
    """Map function of the first pass: per row group its bad rows and the number of rows of each class."""

    def __init__(self, plan: ReadPlan) -> None:
        self.plan = replace(plan, row_groups=())

    def __call__(self, groups: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        for group in _row_groups(groups):
            bad_rows: list[BadRow] = []
            counts = {name: [0] * control.num_classes for name, control in self.plan.controls.items()}
            damage = ""
            try:
                for row in self.plan.rows(group):
                    if isinstance(row, BadRow):
                        bad_rows.append(row)
                    else:
                        for name in counts:
                            counts[name][row[name]] += 1
            except DataError as error:  # as a value, so that the driver raises it plainly and not inside Ray's
                damage = str(error)
            found = {"bad_rows": json.dumps(bad_rows), "class_counts": json.dumps(counts), "damage": damage}
            yield {name: np.array([value]) for name, value in found.items()}


class _Read:
    """Map function of the data set: a row group's good rows in batches of bounded size."""

    def __init__(self, plan: ReadPlan, skipped: frozenset[tuple[str, int]]) -> None:
        self.plan, self.skipped = replace(plan, row_groups=()), skipped

    def __call__(self, groups: dict[str, np.ndarray]) -> Iterator[dict[str, np.ndarray]]:
        height, width = self.plan.expected_size or (1, 1)
        batch_size = max(1, _BATCH_BYTES // (height * width * 3))
        batch: list[dict[str, Any]] = []
        for group in _row_groups(groups):
            for row in self.plan.rows(group):
                if not isinstance(row, BadRow):
                    batch.append(row)
                elif (row.file, row.row) not in self.skipped:
                    raise DataError(f"{row} (the file has changed since it was checked)")
                if len(batch) == batch_size:
                    yield _to_columns(batch, self.plan.controls)
                    batch = []
        if batch:
            yield _to_columns(batch, self.plan.controls)


def _to_columns(rows: list[dict[str, Any]], controls: Mapping[str, ControlConfig]) -> dict[str, np.ndarray]:
    columns = {
        IMAGE: np.stack([row[IMAGE] for row in rows]),
        PROMPT: np.array([row[PROMPT] for row in rows], dtype=object),
    }
    for name, control in controls.items():
        columns[name] = np.array([row[name] for row in rows], dtype=np.int64)
        if control.thresholds:
            columns[value_column(name)] = np.array([row[value_column(name)] for row in rows], dtype=np.float64)
    return columns


def _row_groups(batch: dict[str, np.ndarray]) -> Iterator[RowGroup]:
    for file, index, first_row, num_rows in zip(*(batch[key] for key in RowGroup._fields), strict=True):
        yield RowGroup(str(file), int(index), int(first_row), int(num_rows))


def _stream(plan: ReadPlan) -> ray.data.Dataset:
    groups = [group._asdict() for group in plan.row_groups if group.num_rows]
    return start_stream(groups, items_per_task=1, block_bytes=_BLOCK_BYTES)
