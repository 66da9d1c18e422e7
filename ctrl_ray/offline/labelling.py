"""From a folder of images to the Parquet data set of `schema`: measure, join what the user knows, write.

Ray Data reads and measures the images in parallel; this process writes the rows as they come, in the order of the file
names, a few megabytes at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from ctrl_ray.config.control import check_control_name
from ctrl_ray.config.paths import absolute_oracle
from ctrl_ray.errors import ConfigError, DataError
from ctrl_ray.offline.annotations import (
    Prompts,
    Table,
    numeric_columns,
    prompt_of,
    read_table,
    text_columns,
    unused_rows,
    values_of,
)
from ctrl_ray.offline.folder import ImageFiles, find_images
from ctrl_ray.offline.measuring import UNSCALED, Work, measured
from ctrl_ray.offline.reading import OnBadRow, side_file
from ctrl_ray.offline.schema import IMAGE, PROMPT, BadRow, caption_hint, check_on_bad_row, handle_bad_rows
from ctrl_ray.offline.text import UTF_8
from ctrl_ray.offline.writing import ParquetSink, refuse_existing
from ctrl_ray.oracles import UNITS, control_name, is_told_prompt, load_oracle


@dataclass(frozen=True, kw_only=True)
class LabelledData:
    """What `label` wrote."""

    output: str
    """The Parquet file, or the folder of them."""
    num_rows: int
    """Rows in it."""
    num_bad_rows: int
    """Rows set aside."""
    bad_rows_file: str
    """Where they are, when there are any."""
    values: dict[str, np.ndarray]
    """Per control the column that was written, (num_rows,): float64, or int64 for a user's integer labels."""
    oracles: dict[str, str]
    """Oracle of each control that was measured."""
    num_copies: int = 0
    """Rows whose image file is the same, byte by byte, as that of an earlier row."""
    num_unscaled: int = 0
    """Rows whose 16-bit image is nearly black, as 12-bit data is that nobody scaled."""


def label(
    images: str | Path,
    output: str | Path,
    *,
    controls: Sequence[str] = ("jpeg_size",),
    prompts: Prompts = "none",
    prompts_file: str | Path | None = None,
    columns: str | Path | None = None,
    image_size: tuple[int, int] | None = None,
    encoding: str = UTF_8,
    on_bad_row: OnBadRow = "error",
    overwrite: bool = False,
    progress: bool = True,
) -> LabelledData:
    """Write the images below a folder, with their labels, as a Parquet data set. Ray must be initialised.

    images: a folder (searched recursively) of image files, local or any URI that pyarrow.fs opens; their bytes are
    stored as they are (as PNG where their metadata cannot be read, for which other programs may refuse them).
    output: one file when it ends in .parquet, else a folder of parts.
    controls: oracles, each a column named after it: 'jpeg_size', 'colourfulness', 'my_module:my_oracle'.
    prompts_file: .csv or .jsonl with `file` and `prompt`. columns: .csv or .jsonl with `file` and columns of integer
    labels or numbers. encoding: of those tables and of the prompts beside the images. image_size (height, width):
    measure the image as scaled and cropped to it.

    Raises ConfigError for settings that contradict each other, an unknown oracle, or an output that exists (without
    `overwrite`), and DataError for an empty folder or a bad row ('error'); 'skip' sets bad rows aside in
    `<output>.bad_rows.jsonl`. Nothing half-written stays behind.
    """
    check_on_bad_row(on_bad_row)
    oracles = _named_oracles(controls)
    prompts_table, table, kinds = _read_tables(prompts_file, columns, encoding)
    _check_settings(oracles, kinds, prompts, prompts_table, table, image_size)
    has_prompts = prompts == "sidecar" or prompts_table is not None
    _check_prompts(oracles, has_prompts)
    refuse_existing(output, overwrite)
    tables = (str(Path(table).expanduser().absolute()) for table in (columns, prompts_file) if table is not None)
    found = find_images(images, beside={*tables, *((".txt",) if prompts == "sidecar" else ())})
    if left_out := found.describe_left_out():
        print(f"{images}: {left_out}", flush=True)
    items, bad_rows = _join(found, prompts_table, table, kinds)
    num_found = len(items) + len(bad_rows)
    if bad_rows and on_bad_row == "error":
        handle_bad_rows(bad_rows, num_found, on_bad_row, "", source=str(images))
    work = Work(
        filesystem=found.filesystem,
        oracles=oracles,
        image_size=image_size,
        sidecar=prompts == "sidecar",
        encoding=encoding,
        search_path=os.getcwd(),
    )
    schema = _schema(oracles, kinds, has_prompts, image_size)
    written = _Written({name: [] for name in (*oracles, *kinds)})
    with ParquetSink(output, schema, overwrite=overwrite) as sink:
        for row in tqdm(
            measured(items, work), total=len(items), desc="label", unit=" images", mininterval=0.5, disable=not progress
        ):
            if isinstance(row, BadRow):
                bad_rows.append(row)
                if on_bad_row == "error":
                    handle_bad_rows(bad_rows, num_found, on_bad_row, "", source=str(images))
                continue
            sink.write(row)
            written.add(row)
        handle_bad_rows(bad_rows, num_found, on_bad_row, side_file(output), source=str(images))
    return LabelledData(
        output=str(output),
        num_rows=sink.num_rows,
        num_bad_rows=len(bad_rows),
        bad_rows_file=side_file(output),
        values={name: np.array(column, dtype=kinds.get(name, float)) for name, column in written.values.items()},
        oracles=oracles,
        num_copies=written.num_copies,
        num_unscaled=written.num_unscaled,
    )


def _read_tables(
    prompts_file: str | Path | None, columns: str | Path | None, encoding: str
) -> tuple[Table | None, Table | None, dict[str, type]]:
    """The table of prompts, which may be that of labels; the table of labels; the type of each of its columns of numbers."""
    prompts_table = read_table(prompts_file, encoding) if prompts_file is not None else None
    if columns is None:
        return prompts_table, None, {}
    table = read_table(columns, encoding)
    kinds = numeric_columns(table)
    if texts := text_columns(table):
        print(f"{table.source}: {', '.join(texts)}: text, not labels; left out", flush=True)
    if prompts_table is None and PROMPT in table.columns:
        prompts_table = table
    return prompts_table, table, kinds


@dataclass
class _Written:
    """What is remembered of the rows that were written."""

    values: dict[str, list[float]]
    num_copies: int = 0
    num_unscaled: int = 0
    _images: set[bytes] = field(default_factory=set)

    def add(self, row: dict[str, Any]) -> None:
        for name, column in self.values.items():
            column.append(row[name])
        digest = hashlib.blake2b(row[IMAGE], digest_size=16).digest()
        self.num_copies += digest in self._images
        self.num_unscaled += row[UNSCALED]
        self._images.add(digest)


def _named_oracles(controls: Sequence[str]) -> dict[str, str]:
    """Control name -> oracle, each of which loads."""
    oracles: dict[str, str] = {}
    for oracle in map(absolute_oracle, controls):
        load_oracle(oracle)
        name = control_name(oracle)
        check_control_name(name)
        if name in oracles:
            raise ConfigError(
                f"controls name two oracles for the column {name!r}: {oracles[name]!r} and {oracle!r}; rename one"
            )
        oracles[name] = oracle
    return oracles


def _check_prompts(oracles: dict[str, str], has_prompts: bool) -> None:
    blind = [oracle for oracle in oracles.values() if not has_prompts and is_told_prompt(oracle)]
    if blind:
        raise ConfigError(
            f"oracle {blind[0]!r} judges an image with its prompt, but no prompts are given; give --prompts sidecar, "
            "--prompts-file, or a table of labels with a column 'prompt'"
        )


def _check_settings(
    oracles: dict[str, str],
    kinds: dict[str, type],
    prompts: Prompts,
    prompts_table: Table | None,
    table: Table | None,
    image_size: tuple[int, int] | None,
) -> None:
    if not oracles and not kinds:
        raise ConfigError(
            "there is no control to write: controls is empty and no column of labels was given; name an oracle with "
            "--controls, or give a table with --columns"
        )
    for name in (*oracles, *kinds):
        if name in (IMAGE, PROMPT) or (name in oracles and name in kinds):
            raise ConfigError(f"two columns would be called {name!r}; rename the control or the column of the table")
    if prompts == "sidecar" and prompts_table is not None:
        raise ConfigError(
            f"prompts are given twice: beside the images (--prompts sidecar) and in {prompts_table.source}; keep one"
        )
    if prompts_table is not None and PROMPT not in prompts_table.columns:
        raise DataError(
            f"{prompts_table.source}, every row: column {PROMPT!r} is missing; it has {list(prompts_table.columns)}; expected "
            f"the columns file and {PROMPT}{caption_hint(prompts_table.columns)}"
        )
    if prompts_table is not None and table is not None and prompts_table is not table and PROMPT in table.columns:
        raise ConfigError(f"prompts are given twice: in {prompts_table.source} and in {table.source}; keep one")
    if image_size is not None and min(image_size) < 1:
        raise ConfigError(f"image_size is {image_size}; expected (height, width) in pixels, each at least 1")


def _join(
    found: ImageFiles, prompts_table: Table | None, table: Table | None, kinds: dict[str, type]
) -> tuple[list[dict[str, Any]], list[BadRow]]:
    """One item of work per image whose annotations are there, and the bad rows found so far."""
    names = [file.removeprefix(found.root).lstrip("/") for file in found.files]
    bad_rows = list(found.bad_rows)
    for source in {id(t): t for t in (prompts_table, table) if t is not None}.values():
        bad_rows += unused_rows(source, set(names))
    items: list[dict[str, Any]] = []
    for row, (file, name) in enumerate(zip(found.files, names, strict=True)):
        item: dict[str, Any] = {"file": file, "row": row}
        prompt = prompt_of(name, row, prompts_table) if prompts_table is not None else None
        known = values_of(name, row, table, kinds)
        if isinstance(prompt, BadRow) or isinstance(known, BadRow):
            bad_rows.append(next(found for found in (prompt, known) if isinstance(found, BadRow)))
            continue
        if prompt is not None:
            item[PROMPT] = prompt
        items.append({**item, "known": json.dumps(known)})
    return items, bad_rows


def _schema(
    oracles: dict[str, str], kinds: dict[str, type], has_prompts: bool, image_size: tuple[int, int] | None
) -> pa.Schema:
    """Columns of the output; how the numbers were measured stands in its metadata, under the key `ctrl_ray`."""
    fields = [pa.field(IMAGE, pa.binary(), nullable=False)]
    if has_prompts:
        fields.append(pa.field(PROMPT, pa.string(), nullable=False))
    fields += [pa.field(name, pa.float64(), nullable=False) for name in oracles]
    fields += [
        pa.field(name, pa.int64() if kind is int else pa.float64(), nullable=False) for name, kind in kinds.items()
    ]
    measured = {name: {"oracle": oracle, "unit": UNITS.get(oracle, "")} for name, oracle in oracles.items()}
    metadata = json.dumps({"measured": measured, "image_size": image_size})
    return pa.schema(fields, metadata={"ctrl_ray": metadata})
