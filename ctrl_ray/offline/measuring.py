"""Measuring image files in parallel under Ray Data: bytes and numbers out, in the order of the files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import fs

from ctrl_ray.errors import DataError, ResourceError
from ctrl_ray.offline.images import FORMATS, UndecodableImageError, cover_and_crop, decode, to_png
from ctrl_ray.offline.schema import IMAGE, PROMPT, BadRow
from ctrl_ray.offline.storage import read_bytes
from ctrl_ray.offline.streaming import start_stream
from ctrl_ray.offline.text import decode_text
from ctrl_ray.oracles import load_oracle, measure_one
from ctrl_ray.ray_internals import map_with_few_retries

UNSCALED = "looks_unscaled"
"""Key of a finished row: `images.Decoded.looks_unscaled`."""

_SKIP_HINT = "or set it aside with --on-bad-row skip"
_MAX_RETRIES = 2
_BLOCK_BYTES = 16 * 2**20
_FILES_PER_TASK = 16


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a measuring task knows; plain values, so it travels to workers."""

    filesystem: fs.FileSystem
    oracles: dict[str, str]
    image_size: tuple[int, int] | None
    sidecar: bool
    encoding: str
    search_path: str


def measured(items: list[dict[str, Any]], work: Work) -> Iterator[dict[str, Any] | BadRow]:
    """The finished rows, or why they are bad, in the order of `items`, as they come out of Ray Data.

    items: `file`, `row`, `known` (JSON of the user's labels) and, when a table gives it, `prompt`.
    """
    if not items:
        return
    files = start_stream(items, items_per_task=_FILES_PER_TASK, block_bytes=_BLOCK_BYTES)
    rows = map_with_few_retries(files, _Measure(work), _MAX_RETRIES)
    for found in _until_one_dies(rows.iter_rows()):
        if found["reason"]:
            yield BadRow(found["file"], found["row"], found["reason"])
        else:
            yield {name: found[name] for name in (IMAGE, PROMPT, UNSCALED)} | json.loads(found["numbers"])


def _until_one_dies(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    import ray.exceptions as died

    try:
        yield from rows
    except (died.WorkerCrashedError, died.OutOfMemoryError, died.NodeDiedError) as error:
        raise ResourceError(
            f"a process that measures images died {_MAX_RETRIES + 1} times ({type(error).__name__}): an oracle that ends its "
            "process, or too little memory; try the oracle on one image, or give the process less to do at a time"
        ) from error


class _Measure:
    """Map function: image files in, their bytes and numbers (or the reason why there are none) out."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def __call__(self, items: dict[str, np.ndarray]) -> Iterator[pa.Table]:
        if self.work.search_path not in sys.path:
            sys.path.insert(0, self.work.search_path)
        oracles = {name: load_oracle(oracle) for name, oracle in self.work.oracles.items()}
        rows: list[dict[str, Any]] = []
        size = 0
        for index, file in enumerate(items["file"]):
            item = {key: column[index] for key, column in items.items()}
            rows.append(self._row(str(file), int(item["row"]), item, oracles))
            size += len(rows[-1][IMAGE])
            if size >= _BLOCK_BYTES:
                yield pa.Table.from_pylist(rows, schema=_WORK_SCHEMA)
                rows, size = [], 0
        if rows:
            yield pa.Table.from_pylist(rows, schema=_WORK_SCHEMA)

    def _row(self, file: str, row: int, item: dict[str, Any], oracles: dict[str, Any]) -> dict[str, Any]:
        found = {"file": file, "row": row, IMAGE: b"", PROMPT: item.get(PROMPT, ""), "numbers": "", "reason": ""}
        found[UNSCALED] = False
        try:
            data = read_bytes(self.work.filesystem, file)
            image, found[UNSCALED], odd_metadata = decode(data)
            if odd_metadata:
                data = to_png(image)
            image = cover_and_crop(image, self.work.image_size)
            if self.work.sidecar:
                found[PROMPT] = self._sidecar(file)
            numbers = {name: measure_one(oracle, image, found[PROMPT]) for name, oracle in oracles.items()}
        except UndecodableImageError as error:
            reason = (
                f"the image does not decode: {error}; expected a {', '.join(FORMATS)} file or another that Pillow opens; "
                f"replace or remove it, {_SKIP_HINT}"
            )
            return {**found, "reason": reason}
        except DataError as error:
            return {**found, "reason": f"{error}, {_SKIP_HINT}"}
        except OSError as error:
            return {**found, "reason": f"cannot be read ({error}); correct its permissions or remove it, {_SKIP_HINT}"}
        return {**found, IMAGE: data, "numbers": json.dumps({**numbers, **json.loads(item["known"])})}

    def _sidecar(self, file: str) -> str:
        beside = os.path.splitext(file)[0] + ".txt"
        try:
            prompt = " ".join(
                decode_text(
                    read_bytes(self.work.filesystem, beside), f"its prompt file {beside}", self.work.encoding
                ).split()
            )
        except FileNotFoundError as error:
            raise DataError(f"has no prompt: {beside} does not exist; write the prompt into it") from error
        if not prompt:
            raise DataError(f"its prompt file {beside} is empty; write the prompt into it")
        return prompt


_WORK_SCHEMA = pa.schema(
    {
        "file": pa.string(),
        "row": pa.int64(),
        IMAGE: pa.large_binary(),
        PROMPT: pa.string(),
        UNSCALED: pa.bool_(),
        "numbers": pa.string(),
        "reason": pa.string(),
    }
)
