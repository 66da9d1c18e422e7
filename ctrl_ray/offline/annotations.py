"""What a user knows about image files: prompts and labels, in tables or in text files beside the images."""

from __future__ import annotations

import csv
import io
import json
import math
import posixpath
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ctrl_ray.config.control import same_text
from ctrl_ray.errors import DataError
from ctrl_ray.offline.schema import IMAGE, PROMPT, BadRow
from ctrl_ray.offline.text import UTF_8, lines_of, read_text
from ctrl_ray.wording import no_file

FILE = "file"
"""Column of a table that names the image, relative to the images folder."""

_FILE_TOO = ("file_name", "filename")
"""What other tools call that column."""
_MISSING = ("", "nan", "na", "n/a", "null", "none")
"""What other tools write into a cell that has no value, in lower case."""

Prompts = Literal["none", "sidecar"]
"""'none': no prompts; 'sidecar': photo.png has its prompt in photo.txt beside it."""

_FIX = "fill it in, or set bad rows aside with --on-bad-row skip"


@dataclass(frozen=True)
class Table:
    """A table whose rows belong to image files."""

    source: str
    """The file it was read from."""
    columns: tuple[str, ...]
    """Its columns without `file`."""
    rows: dict[str, tuple[int, dict[str, str]]]
    """Image file -> number of its row, counted from 0, and the row."""


def read_table(path: str | Path, encoding: str = UTF_8) -> Table:
    """A .csv or .tsv with a header, or a .jsonl with one object a line; every row names its image in `file`.

    Raises DataError when there is no such file, no `file` column, a file named twice, or no row; and where it is no text, no
    table, or a cell is no text that can be written.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        raise DataError(f"{source} {no_file(source)}; expected a .csv, .tsv or .jsonl file with a column {FILE!r}")
    rows: dict[str, tuple[int, dict[str, str]]] = {}
    columns: dict[str, None] = {}
    for number, row in enumerate(_read_rows(source, encoding)):
        if FILE not in row and (also := next((name for name in _FILE_TOO if name in row), None)):
            row[FILE] = row.pop(also)
        if not row.get(FILE):
            raise DataError(
                f"{BadRow(str(source), number, f'no {FILE!r} among {list(row)}')}; expected the name of an image, "
                "relative to the images folder, in every row; add it"
            )
        file = same_text(str(PurePosixPath(row.pop(FILE).replace("\\", "/"))))
        if file in rows:
            raise DataError(
                f"{BadRow(str(source), number, f'{file} was named in row {rows[file][0]} already')}; remove one"
            )
        rows[file] = (number, row)
        columns.update(dict.fromkeys(row))
    if not rows:
        raise DataError(f"{source} is an empty set: it holds no row; expected one for each image")
    return Table(str(source), tuple(columns), rows)


def _read_rows(source: Path, encoding: str) -> Iterator[dict[str, str]]:
    readers = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _json_rows, ".json": _json_rows}
    reader = readers.get(source.suffix.lower())
    if reader is None:
        raise DataError(f"{source} ends in {source.suffix!r}; expected a .csv, .tsv or .jsonl file: save it as one")
    yield from reader(str(source), read_text(source, encoding))


def _csv_rows(source: str, text: str) -> Iterator[dict[str, str]]:
    """Separated by commas or, where only that makes a column `file`, by semicolons or tabs."""
    text = re.sub("^sep=.[\r\n]+", "", text, count=1)  # a line for Excel
    header = (lines_of(text) or [""])[0]
    apart = {separator: [cell.strip().strip('"') for cell in header.split(separator)] for separator in ",;\t"}
    separator = next((one for one, cells in apart.items() if {FILE, *_FILE_TOO} & set(cells)), ",")
    twice = [cell for cell, count in Counter(apart[separator]).items() if count > 1 and cell]
    if twice:
        raise DataError(f"{source} has two columns called {twice[0]!r}; rename or remove one")
    reader, number = csv.DictReader(io.StringIO(text, newline=""), delimiter=separator, strict=True), -1
    try:
        for number, cells in enumerate(reader):
            if None in cells or None in cells.values():
                raise DataError(
                    f"{BadRow(source, number, 'has another number of cells than the header')}; put cells that hold a "
                    f"{'comma' if separator == ',' else 'separator'} into double quotes"
                )
            row = {key.strip(): value.strip() for key, value in cells.items()}
            if "" in row:
                raise DataError(
                    f"{source} has a column without a name, as pandas writes its index; remove it (index=False), or name it"
                )
            yield row
    except csv.Error as error:
        raise DataError(
            f"{BadRow(source, number + 1, f'is no row of a table ({error})')}; most likely a quotation mark is not closed there"
        ) from error


def _json_rows(source: str, text: str) -> Iterator[dict[str, str]]:
    """One object a line, or one list of objects."""
    whole = text.lstrip().startswith("[")
    rows: list[Any] = []
    for number, part in enumerate([text] if whole else (line for line in lines_of(text) if line.strip())):
        try:
            rows += json.loads(part) if whole else [json.loads(part)]
        except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
            raise DataError(f"{BadRow(source, number, f'not JSON: {error}')}; correct the line") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{BadRow(source, number, 'not a JSON object')}; expected {{...}} a line")
        yield {key: _cell(source, number, key, value) for key, value in row.items()}


def _cell(source: str, number: int, column: str, value: object) -> str:
    """A JSON value as a table's cell: true is 1, null is empty."""
    if value is None:
        return ""
    if column in (PROMPT, FILE) and not isinstance(value, str):
        raise DataError(f"{BadRow(source, number, f'{column} is {json.dumps(value)}')}; expected a text: write one")
    text = str(int(value)) if isinstance(value, bool) else str(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{BadRow(source, number, f'{column} holds half a character ({error.reason}), as a text that was cut')}; correct it"
        ) from error
    return text


def text_columns(table: Table) -> tuple[str, ...]:
    """Columns other than `prompt` none of whose cells is a number, where another column has some: they are no labels."""
    cells = {
        column: [row[column] for _, row in table.rows.values() if not _is_missing(row.get(column))]
        for column in table.columns
        if column not in (PROMPT, IMAGE)
    }
    texts = tuple(column for column, found in cells.items() if found and not any(map(_is_finite, found)))
    return texts if len(texts) < len(cells) else ()


def numeric_columns(table: Table) -> dict[str, type]:
    """Type of each of the table's columns other than `prompt` and its `text_columns`: int when all of its numbers are
    whole, else float.

    Raises DataError for a column that is called `image`, or that holds no number.
    """
    kinds: dict[str, type] = {}
    if IMAGE in table.columns:
        raise DataError(f"{table.source}, every row: column {IMAGE!r} is taken by the images; rename it")
    left_out = (PROMPT, *text_columns(table))
    for column in (column for column in table.columns if column not in left_out):
        filled = [(number, row[column]) for number, row in table.rows.values() if not _is_missing(row.get(column))]
        numbers = [cell for _, cell in filled if _is_finite(cell)]
        if filled and not numbers:
            raise DataError(str(_no_number(table, column, *filled[0])))
        kinds[column] = int if all(map(_is_whole, numbers)) else float
    return kinds


def values_of(file: str, row: int, table: Table | None, kinds: dict[str, type]) -> dict[str, int | float] | BadRow:
    """The table's values for one image file; row: its number among the images, for the message."""
    if table is None:
        return {}
    found = table.rows.get(same_text(file))
    if found is None:
        return BadRow(file, row, f"has no row in {table.source}; add one that names it in {FILE!r}, or {_FIX}")
    number, cells = found
    for column in kinds:
        cell = cells.get(column, "")
        if _is_missing(cell):
            shown = f"is {cell!r}" if cell else "is empty"
            return BadRow(table.source, number, f"column {column!r} of {file} {shown}; expected a number; {_FIX}")
        if not _is_finite(cell):
            return _no_number(table, column, number, cell)
    return {column: kind(cells[column]) for column, kind in kinds.items()}


def _no_number(table: Table, column: str, number: int, cell: str) -> BadRow:
    return BadRow(
        table.source,
        number,
        f"column {column!r} is {cell!r}; expected an integer label (0, 1, ...) or a finite number; number the class names, "
        "remove the column, or set bad rows aside with --on-bad-row skip",
    )


def prompt_of(file: str, row: int, table: Table) -> str | BadRow:
    """The prompt that a table gives to one image file."""
    found = table.rows.get(same_text(file))
    if found is None:
        return BadRow(file, row, f"has no prompt in {table.source}; add a row that names it in {FILE!r}, or {_FIX}")
    number, cells = found
    prompt = cells.get(PROMPT, "")
    if not prompt:
        return BadRow(table.source, number, f"the prompt of {file} is empty; expected a text; {_FIX}")
    return prompt


def unused_rows(table: Table, files: set[str]) -> list[BadRow]:
    """Rows of the table that name no image of the folder: most likely a misspelt name."""
    composed = {same_text(file) for file in files}
    unused = [(name, number) for name, (number, _) in table.rows.items() if name not in composed]
    loose = {key: file for file in sorted(composed) for key in _loosely(file)} if unused else {}
    rows = []
    for name, number in unused:
        near = next((loose[key] for key in _loosely(name) if key in loose), None)
        meant = f" (did you mean {near!r}?)" if near else ""
        reason = (
            f"{FILE} is {name!r}, which is no image of the folder{meant}; correct the name, remove the row, or set bad rows "
            "aside with --on-bad-row skip"
        )
        rows.append(BadRow(table.source, number, reason))
    return rows


def _loosely(name: str) -> tuple[str, ...]:
    """What a file may be called instead: in other case, without its folder, without its ending."""
    return tuple(part.casefold() for part in (name, posixpath.basename(name), posixpath.splitext(name)[0]))


def _is_missing(cell: str | None) -> bool:
    return (cell or "").lower() in _MISSING


def _is_whole(cell: str) -> bool:
    try:
        return abs(int(cell)) < 2**63
    except ValueError:
        return False


def _is_finite(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False
