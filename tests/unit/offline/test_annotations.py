"""Tables of prompts and labels as spreadsheets, pandas and scripts write them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from ctrl_ray.errors import DataError
from ctrl_ray.offline.annotations import (
    numeric_columns,
    prompt_of,
    read_table,
    text_columns,
    unused_rows,
    values_of,
)


def _table(tmp_path: Path, name: str, text: str) -> Path:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators(separator: str, tmp_path: Path) -> None:
    text = f'"file"{separator}prompt{separator}stars\na.png{separator}"big{separator} red"{separator}1\n'
    table = read_table(_table(tmp_path, "labels.csv", text))
    assert table.rows == {"a.png": (0, {"prompt": f"big{separator} red", "stars": "1"})}
    assert numeric_columns(table) == {"stars": int}


def test_a_comma_wins_where_both_would_do(tmp_path: Path) -> None:
    table = read_table(_table(tmp_path, "labels.csv", "file,prompt\na.png,red; blue\n"))
    assert table.rows["a.png"][1] == {"prompt": "red; blue"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", 'file,stars\n"a.png,1\nb.png,1\n', r"a\.csv, row 0 .*quotation mark is not closed there"),
        (
            "a.csv",
            'file,stars\na.png,1\n"b.png,1\n' + "x.png,1\n" * 20_000,
            r"a\.csv, row 1 .*quotation mark is not closed",
        ),
        (
            "a.csv",
            ",file,stars\n0,a.png,1\n",
            r"column without a name, as pandas writes its index; remove it \(index=False\)",
        ),
        ("a.csv", "name,stars\na.png,1\n", r"row 0 .*no 'file' among \['name', 'stars'\]"),
        ("a.csv", "file;stars\na.png;1;2\n", r"another number of cells than the header.*hold a separator"),
        ("a.jsonl", '{"file": "a.png", "prompt": NaN}\n', r"row 0 .*prompt is NaN; expected a text"),
        ("a.jsonl", '{"file": "a.png", "prompt": ["a", "b"]}\n', r'row 0 .*prompt is \["a", "b"\]; expected a text'),
        ("a.jsonl", '{"file": 3}\n', r"row 0 .*file is 3; expected a text"),
        ("a.jsonl", '{"file": "a.png", "prompt": "a dog \\ud83d"}\n', r"row 0 .*prompt holds half a character"),
        ("a.jsonl", "[" * 100_000, "row 0 .*not JSON"),
        ("a.jsonl", '{"file": "a.png", "n": ' + "9" * 5000 + "}", "row 0 .*not JSON"),
        ("a.jsonl", "[1, 2]", "row 0 .*not a JSON object"),
        ("a.csv", "file,stars,stars\na.png,1,2\n", r"a\.csv has two columns called 'stars'"),
    ],
)
def test_what_is_no_table_is_refused_by_its_row(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_table(_table(tmp_path, name, text))


def test_booleans_are_labels(tmp_path: Path) -> None:
    text = '{"file": "a.png", "indoor": true}\n{"file": "b.png", "indoor": false}\n{"file": "c.png", "indoor": null}\n'
    table = read_table(_table(tmp_path, "labels.jsonl", text))
    kinds = numeric_columns(table)
    assert kinds == {"indoor": int}
    assert [values_of(file, 0, table, kinds) for file in ("a.png", "b.png")] == [{"indoor": 1}, {"indoor": 0}]
    assert "is empty" in str(values_of("c.png", 2, table, kinds))


def test_text_beside_labels_is_no_label(tmp_path: Path) -> None:
    table = read_table(
        _table(tmp_path, "labels.csv", "file,photographer,stars,prompt\na.png,Ines,1,red\nb.png,Jo,0,blue\n")
    )
    assert text_columns(table) == ("photographer",) and numeric_columns(table) == {"stars": int}
    alone = read_table(_table(tmp_path, "words.csv", "file,style\na.png,cubist\n"))
    with pytest.raises(DataError, match="'style' is 'cubist'; expected an integer label"):
        numeric_columns(alone)
    mixed = read_table(_table(tmp_path, "mixed.csv", "file,stars,year\na.png,1,1990\nb.png,unsure,1991\n"))
    kinds = numeric_columns(mixed)
    assert kinds == {"stars": int, "year": int}
    assert values_of("a.png", 0, mixed, kinds) == {"stars": 1, "year": 1990}
    assert "row 1 (counted from 0): column 'stars' is 'unsure'; expected" in str(values_of("b.png", 1, mixed, kinds))


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_accents_are_the_same_however_they_are_written(on_disk: str, in_table: str, tmp_path: Path) -> None:
    text = "file,stars,prompt\nGrün.png,3,a tree\n"
    table = read_table(_table(tmp_path, "labels.csv", unicodedata.normalize(in_table, text)))  # type: ignore[arg-type]
    file = unicodedata.normalize(on_disk, "Grün.png")  # type: ignore[arg-type]
    assert values_of(file, 0, table, numeric_columns(table)) == {"stars": 3}
    assert prompt_of(file, 0, table) == "a tree"
    assert unused_rows(table, {file}) == []


@pytest.mark.parametrize("cell", ["nan", "NaN", "NA", "null", "None", ""])
def test_what_other_tools_write_for_a_missing_value(cell: str, tmp_path: Path) -> None:
    table = read_table(_table(tmp_path, "labels.csv", f"file,stars\na.png,1\nb.png,{cell}\n"))
    kinds = numeric_columns(table)
    assert kinds == {"stars": int}, "one missing value makes no column of text or of real numbers"
    assert "column 'stars' of b.png is" in str(values_of("b.png", 1, table, kinds))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("labels.csv", "sep=;\nfile;stars\na.png;3\n"),
        ("metadata.csv", "file_name,stars\na.png,3\n"),
        ("metadata.csv", "filename;stars\na.png;3\n"),
        ("labels.json", '[{"file": "a.png", "stars": 3}]'),
        ("metadata.jsonl", '{"file_name": "a.png", "stars": 3}'),
    ],
)
def test_tables_of_other_tools(name: str, text: str, tmp_path: Path) -> None:
    assert read_table(_table(tmp_path, name, text)).rows == {"a.png": (0, {"stars": "3"})}


@pytest.mark.parametrize("name", [".", "..", "/", "a/.."])
def test_names_that_name_no_file(name: str, tmp_path: Path) -> None:
    table = read_table(_table(tmp_path, "labels.csv", f"file,stars\n{name},1\n"))
    (row,) = unused_rows(table, {"a.png"})
    assert "is no image of the folder; correct" in row.reason


@pytest.mark.parametrize("name", ["img_1.png", "IMG_1", "photos/IMG_1.JPG", "IMG_1.jpeg"])
def test_the_file_that_is_meant(name: str, tmp_path: Path) -> None:
    table = read_table(_table(tmp_path, "labels.csv", f"file,stars\n{name},1\n"))
    (row,) = unused_rows(table, {"sub/IMG_1.JPG" if "/" in name else "IMG_1.png", "other.png"})
    assert f"is {name!r}, which is no image of the folder (did you mean" in row.reason and "IMG_1" in row.reason
    (lost,) = unused_rows(table, {"other.png"})
    assert "did you mean" not in lost.reason
