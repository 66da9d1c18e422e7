"""What reading a data set comes to: its files and row groups, checked columns, and validated rows. No Ray here."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import ConfigError, DataError
from ctrl_ray.offline.schema import (
    IMAGE,
    BadRow,
    RowError,
    check_columns,
    check_controls,
    check_row,
    handle_bad_rows,
)
from ctrl_ray.offline.storage import list_files

_ROWS_PER_READ = 32


class RowGroup(NamedTuple):
    """One row group of one file, and the number of its first row there."""

    file: str
    group: int
    first_row: int
    num_rows: int


@dataclass(frozen=True, kw_only=True)
class ReadPlan:
    """All that reading a row group takes."""

    filesystem: fs.FileSystem
    row_groups: tuple[RowGroup, ...]
    columns: tuple[str, ...]
    controls: dict[str, ControlConfig]
    image_size: tuple[int, int] | None
    expected_size: tuple[int, int] | None = None

    @property
    def num_rows(self) -> int:
        """Rows of all row groups, good and bad."""
        return sum(group.num_rows for group in self.row_groups)

    def raw_rows(self, group: RowGroup) -> Iterator[tuple[int, dict[str, Any]]]:
        """Row number in the file and the raw values, a few rows in memory at a time."""
        with open_parquet(self.filesystem, group.file) as parquet:
            number = group.first_row
            batches = parquet.iter_batches(_ROWS_PER_READ, row_groups=[group.group], columns=list(self.columns))
            while (batch := next_batch(batches, group.file, number)) is not None:
                for raw in batch.to_pylist():
                    yield number, raw
                    number += 1

    def rows(self, group: RowGroup) -> Iterator[dict[str, Any] | BadRow]:
        """Every row of the group, validated (`schema.check_row`), or the BadRow it is."""
        for number, raw in self.raw_rows(group):
            try:
                yield check_row(raw, self.controls, image_size=self.image_size, expected_size=self.expected_size)
            except RowError as error:
                yield BadRow(group.file, number, str(error))


def plan_reading(
    path: str | Path,
    controls: Mapping[str, ControlConfig],
    *,
    image_size: tuple[int, int] | None = None,
    needs_prompts: bool = False,
) -> ReadPlan:
    """List the files, check their columns, and settle the size of the images. Reads footers and the first image only.

    Raises ConfigError for controls that cannot be read, DataError for a missing, foreign or empty file, an unknown
    column, one of the wrong type, or (with `needs_prompts`) no prompts.
    """
    check_controls(controls)
    if image_size is not None and min(image_size) < 1:
        raise ConfigError(f"image_size is {image_size}; expected (height, width) in pixels, each at least 1")
    filesystem, files = list_files(path, (".parquet",), "a Parquet file or a folder of .parquet files")
    groups: list[RowGroup] = []
    columns: tuple[str, ...] = ()
    for file in files:
        with open_parquet(filesystem, file) as parquet:
            found = check_columns(parquet.schema_arrow, file, controls, needs_prompts=needs_prompts)
            if file != files[0] and found != columns:
                raise DataError(
                    f"{file}, every row: of the columns to read it has {list(found)}, but {files[0]} has "
                    f"{list(columns)}; expected the same columns in every file of {path}; add or drop the difference"
                )
            columns, first_row = found, 0
            for index in range(parquet.num_row_groups):
                num_rows = parquet.metadata.row_group(index).num_rows
                groups.append(RowGroup(file, index, first_row, num_rows))
                first_row += num_rows
    handle_bad_rows([], sum(group.num_rows for group in groups), "error", "", source=str(path))
    plan = ReadPlan(
        filesystem=filesystem, row_groups=tuple(groups), columns=columns, controls=dict(controls), image_size=image_size
    )
    return replace(plan, expected_size=image_size or _first_image_size(plan))


def _first_image_size(plan: ReadPlan) -> tuple[int, int] | None:
    """(height, width) of the first image that decodes; None when none does."""
    images_only = replace(plan, columns=(IMAGE,), controls={})
    for group in plan.row_groups:
        for row in images_only.rows(group):
            if not isinstance(row, BadRow):
                return row[IMAGE].shape[:2]
    return None


def open_parquet(filesystem: fs.FileSystem, file: str) -> pq.ParquetFile:
    """The open file; DataError when it is not there or not Parquet."""
    try:
        return pq.ParquetFile(filesystem.open_input_file(file), buffer_size=2**18, pre_buffer=False)
    except FileNotFoundError as error:
        raise DataError(
            f"{file} does not exist on host {socket.gethostname()}; on a cluster, use storage that every node sees"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} cannot be read as Parquet, from row 0 on ({error}); write it with `python -m ctrl_ray.label`"
        ) from error


def next_batch(batches: Iterator[pa.RecordBatch], file: str, row: int) -> pa.RecordBatch | None:
    """The next rows, or None at the end; DataError where they cannot be read. row: number of the first of them."""
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} cannot be read from row {row} on ({error}); the file is damaged; write it again"
        ) from error
