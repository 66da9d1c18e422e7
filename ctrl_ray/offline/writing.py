"""Writing the Parquet data set: streaming, and complete or not there at all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from ctrl_ray.errors import ConfigError
from ctrl_ray.offline.schema import IMAGE
from ctrl_ray.offline.storage import kind, resolve

ROWS_PER_GROUP = 512
"""Most rows of a row group, which is the unit in which readers share the work."""
BYTES_PER_GROUP = 32 * 2**20
"""Most bytes of images in a row group. A single larger image has a row group of its own."""
BYTES_PER_PART = 512 * 2**20
"""A part of a folder is closed when its images have this many bytes."""

_OTHER_KINDS = (".csv", ".tsv", ".json", ".jsonl", ".pq", ".parq", ".arrow", ".feather", ".zip", ".txt")
_ROWS_PER_PAGE_CHECK = 8
"""How often the writer looks whether a page is full; Arrow's 1024 makes pages of 1024 images, which readers then hold
at once."""


def refuse_existing(output: str | Path, overwrite: bool) -> None:
    """ConfigError when `output` exists and must not be overwritten, is a folder where a file should go, or is named like
    another kind of file."""
    if str(output).lower().endswith(_OTHER_KINDS):
        raise ConfigError(
            f"output {output} ends as another kind of file; expected a name that ends in .parquet, or a folder"
        )
    found = kind(output)
    if found == fs.FileType.NotFound:
        return
    if not overwrite:
        raise ConfigError(f"output {output} exists already; give another path, or --overwrite to replace it")
    if str(output).endswith(".parquet") != (found == fs.FileType.File):
        raise ConfigError(
            f"output {output} exists and is a {found.name.lower()}, which cannot be overwritten by the other kind (a "
            "path that ends in .parquet is a file, any other a folder of parts); give another path"
        )


class ParquetSink:
    """Context that takes rows and leaves a Parquet file (`output` ends in .parquet) or a folder of parts.

    It writes beside the final place and moves there when the context ends without an error; after an error nothing is
    left, and what was there before stays. (Object stores publish a file when it is closed.)
    """

    def __init__(self, output: str | Path, schema: pa.Schema, *, overwrite: bool) -> None:
        self.schema, self.overwrite = schema, overwrite
        self.num_rows = 0
        self._one_file = str(output).endswith(".parquet")
        self._filesystem, self._final = resolve(str(output).rstrip("/"))
        self._local = isinstance(self._filesystem, fs.LocalFileSystem)
        parent, _, name = self._final.rpartition("/")
        self._partial = f"{parent}/.{name}.partial" if self._local or self._one_file else self._final
        self._writer: pq.ParquetWriter | None = None
        self._num_parts = self._group_bytes = self._part_bytes = 0
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> ParquetSink:
        self._remove(self._partial)
        folder = self._partial.rpartition("/")[0] if self._one_file else self._partial
        self._filesystem.create_dir(folder, recursive=True)
        return self

    def write(self, row: dict[str, Any]) -> None:
        """Add a row; keys that are no column are dropped."""
        self._rows.append({name: row[name] for name in self.schema.names})
        self._group_bytes += len(row[IMAGE])
        self.num_rows += 1
        if len(self._rows) >= ROWS_PER_GROUP or self._group_bytes >= BYTES_PER_GROUP:
            self._write_group()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            with contextlib.suppress(OSError, pa.ArrowException):
                self._close_part()
            self._remove(self._partial)
            return
        if self._rows:
            self._write_group()
        self._close_part()
        if self._partial != self._final:
            if self.overwrite:
                self._remove(self._final)
            self._filesystem.move(self._partial, self._final)

    def _write_group(self) -> None:
        if self._writer is None:
            file = self._partial if self._one_file else f"{self._partial}/part-{self._num_parts:05d}.parquet"
            self._writer = pq.ParquetWriter(
                file,
                self.schema,
                filesystem=self._filesystem,
                compression="NONE",  # the images are compressed already
                use_dictionary=False,
                write_batch_size=_ROWS_PER_PAGE_CHECK,
            )
            self._num_parts += 1
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self.schema))
        self._part_bytes += self._group_bytes
        self._rows, self._group_bytes = [], 0
        if not self._one_file and self._part_bytes >= BYTES_PER_PART:
            self._close_part()

    def _close_part(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._part_bytes = None, 0

    def _remove(self, path: str) -> None:
        found = self._filesystem.get_file_info(path).type
        if found == fs.FileType.Directory:
            self._filesystem.delete_dir(path)
        elif found == fs.FileType.File:
            self._filesystem.delete_file(path)
