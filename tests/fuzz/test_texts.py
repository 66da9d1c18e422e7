"""Files of prompts, tables of labels."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from ctrl_ray.offline.annotations import numeric_columns, prompt_of, read_table, text_columns, unused_rows, values_of
from ctrl_ray.offline.prompts import read_prompts
from ctrl_ray.offline.schema import BadRow
from tests.fuzz.command import works_or_is_refused

ENCODINGS = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252", "gb18030"])
TEXTS = st.text(max_size=60) | st.text("a\"',;\t\n\r é\u2028$", max_size=60)
FILES = ("a.png", "sub/b.jpg", "Grün.png")


@contextmanager
def written(name: str, data: bytes) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        yield Path(folder) / name


@given(st.binary(max_size=120) | st.builds(lambda text, code: text.encode(code, "ignore"), TEXTS, ENCODINGS))
@example("a red\u2028circle\r\na café".encode("utf-16"))
@example("café".encode("cp1252"))
def test_prompts_files(data: bytes) -> None:
    with written("prompts.txt", data) as file:
        prompts = works_or_is_refused(lambda: read_prompts(file), "prompts")
    if prompts is not None:
        assert prompts and all(prompt.strip() == prompt != "" for prompt in prompts)
        assert not any(end in prompt for prompt in prompts for end in "\n\r\0")


@given(TEXTS, ENCODINGS)
def test_a_prompts_file_in_a_named_encoding(text: str, encoding: str) -> None:
    try:
        data = text.encode(encoding)
    except UnicodeEncodeError:
        return
    with written("prompts.txt", data) as file:
        prompts = works_or_is_refused(lambda: read_prompts(file, encoding), "prompts")
    lines = [line.strip() for line in text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    if prompts is not None and encoding != "utf-16-le":
        assert prompts == tuple(line for line in lines if line)


def _read(file: Path) -> None:
    """All that `label` does with a table."""
    table = read_table(file)
    text_columns(table)
    kinds = numeric_columns(table)
    unused_rows(table, set(FILES))
    for number, name in enumerate(FILES):
        values = values_of(name, number, table, kinds)
        assert isinstance(values, BadRow) or [type(value) for value in values.values()] == list(kinds.values())
        prompt = prompt_of(name, number, table)
        if not isinstance(prompt, BadRow):
            prompt.encode()


CELLS = (
    st.sampled_from(["1", "0", "-3", "1.5", "nan", "inf", "1e400", "", "true", "x", "9" * 400, "1_000", "٣"]) | TEXTS
)


@given(
    st.lists(st.sampled_from(["file", "prompt", "stars", "image", "file_name", ""]) | TEXTS, min_size=1, max_size=4),
    st.lists(st.lists(CELLS | st.sampled_from(FILES), max_size=4), max_size=4),
    st.sampled_from(",;\t"),
)
def test_tables_that_are_written_well(header: list[str], rows: list[list[str]], separator: str) -> None:
    stream = io.StringIO()
    csv.writer(stream, delimiter=separator).writerows([header, *rows])
    with written("labels.csv", stream.getvalue().encode("utf-8", "surrogatepass")) as file:
        works_or_is_refused(lambda: _read(file), "labels.csv")


@given(st.binary(max_size=200) | TEXTS.map(lambda text: ("file,stars\na.png,1\n" + text).encode("utf-8", "replace")))
@example(b'file,stars\n"a.png,1\n')
@example(b"file,stars\na.png," + b"9" * 200_000 + b"\n")
def test_tables_that_are_none(data: bytes) -> None:
    for name in ("labels.csv", "labels.jsonl", "labels.json", "labels.txt"):
        with written(name, data) as file:
            works_or_is_refused(lambda: _read(file), name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.sampled_from(FILES),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
)


@given(
    st.lists(
        st.dictionaries(st.sampled_from(["file", "prompt", "stars"]) | st.text(max_size=4), JSON, max_size=4),
        max_size=4,
    ),
    st.booleans(),
)
@example([{"file": "a.png", "prompt": "a dog \ud83d"}], False)
def test_tables_of_json(rows: list[dict[str, Any]], in_one_list: bool) -> None:
    text = json.dumps(rows) if in_one_list else "\n".join(json.dumps(row) for row in rows)
    with written("labels.jsonl", text.encode()) as file:
        works_or_is_refused(lambda: _read(file), "labels.jsonl")
