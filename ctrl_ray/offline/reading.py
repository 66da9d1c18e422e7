"""Reading the offline data set row by row, with every row checked; neither a file nor the set has to fit in memory.

    for row in iter_rows("data.parquet", {"jpeg_size": ControlConfig(thresholds=(1500, 1700, 1900))}): ...

Rows keep their order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import DataError
from ctrl_ray.offline.plan import ReadPlan, next_batch, open_parquet, plan_reading
from ctrl_ray.offline.schema import PROMPT, BadRow, check_on_bad_row, handle_bad_rows, has_prompts, no_prompts
from ctrl_ray.offline.storage import list_files

OnBadRow = Literal["error", "skip"]
"""'error': the first bad row raises DataError; 'skip': bad rows are left out and written to a side file."""


def iter_rows(
    path: str | Path,
    controls: Mapping[str, ControlConfig],
    on_bad_row: OnBadRow = "error",
    *,
    image_size: tuple[int, int] | None = None,
    bad_rows_file: str | None = None,
) -> Iterator[dict[str, Any]]:
    """The checked rows of a data set, one by one; a bad row raises when it is reached.

    path: a Parquet file, or a folder of them, local or any URI that pyarrow.fs opens. image_size (height, width):
    scale every image to cover it and crop around the centre; None: all must have the size of the first one.
    bad_rows_file: where 'skip' writes the bad rows; None: `<path>.bad_rows.jsonl`.

    Rows: `image` uint8 (H, W, 3), `prompt` str ("" without the column), per control int class, and where its column
    holds a number `<control>_value` float. The labels are those of the stored image: when image_size changes an image,
    measure them again, or label with the same size.

    Under 'skip' the side file is written, and the number of bad rows logged, when the last row has been read. Raises
    what `plan_reading` raises, and DataError for a bad row ('error') or when no row is left ('skip').
    """
    check_on_bad_row(on_bad_row)
    plan = plan_reading(path, controls, image_size=image_size)
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


def has_prompts_column(path: str | Path) -> bool:
    """Whether the (first file of the) data set has one."""
    filesystem, files = list_files(path, (".parquet",), "a Parquet file or a folder of .parquet files")
    with open_parquet(filesystem, files[0]) as parquet:
        return PROMPT in parquet.schema_arrow.names


def read_prompts_column(path: str | Path) -> tuple[str, ...]:
    """The distinct prompts of a data set, in the order in which they first occur; images are not read.

    Raises DataError when there is no prompt column, or a row without a prompt.
    """
    filesystem, files = list_files(path, (".parquet",), "a Parquet file or a folder of .parquet files")
    prompts: dict[str, None] = {}
    for file in files:
        with open_parquet(filesystem, file) as parquet:
            if not has_prompts(parquet.schema_arrow, file):
                raise DataError(
                    f"{no_prompts(parquet.schema_arrow, file)}, or give the prompts in a text file (prompts_file)"
                )
            row, batches = 0, parquet.iter_batches(4096, columns=[PROMPT])
            while (batch := next_batch(batches, file, row)) is not None:
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
