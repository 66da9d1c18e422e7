"""Reading without Ray: order, row numbers, side file, memory, and the statistics that labelling prints."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import ConfigError, DataError
from ctrl_ray.offline.reading import iter_rows, read_prompts_column
from ctrl_ray.offline.statistics import class_shares, equal_share_thresholds, summarise
from tests.unit.offline.test_schema import encode, pixels

STYLE = {"style": ControlConfig(classes=("a", "b", "c"))}
GOOD = encode(pixels())


def write(
    path: Path, labels: list[int], *, images: dict[int, bytes] | None = None, prompts: list[str | None] | None = None
) -> Path:
    """A file of row groups of three rows; `images` replaces the image of some rows."""
    columns: dict[str, list] = {"image": [(images or {}).get(row, GOOD) for row in range(len(labels))], "style": labels}
    if prompts is not None:
        columns["prompt"] = prompts
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def test_a_folder_is_read_file_by_file_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "b.parquet", [0, 1, 2, 0])
    write(tmp_path / "a.parquet", [2, 2], images={1: encode(pixels(seed=1))})
    write(tmp_path / "sub" / "c.parquet", [1])
    write(tmp_path / "_ignored.parquet", [7])
    (tmp_path / "notes.txt").write_text("not data")
    rows = list(iter_rows(tmp_path, STYLE))
    assert [row["style"] for row in rows] == [2, 2, 0, 1, 2, 0, 1]
    assert np.array_equal(rows[1]["image"], pixels(seed=1))
    assert all(row["prompt"] == "" for row in rows)


def test_a_uri_is_read_like_a_path(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [2, 1])
    assert [row["style"] for row in iter_rows(f"file://{file}", STYLE)] == [2, 1]


def test_the_error_names_file_row_and_fix(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [0] * 5)
    bad = write(tmp_path / "b.parquet", [0, 0, 0, 0, 9, 0])
    with pytest.raises(DataError, match="correct the label") as caught:
        list(iter_rows(tmp_path, STYLE))
    assert str(caught.value).startswith(f"{bad}, row 4 (counted from 0): control 'style' (column 'style') is 9")


def test_skip_sets_bad_rows_aside_and_counts_them(tmp_path: Path, logged: list[str]) -> None:
    file = write(tmp_path / "a.parquet", [0, 5, 2, 1, 1], images={3: b"broken"})
    rows = list(iter_rows(file, STYLE, "skip"))
    assert [row["style"] for row in rows] == [0, 2, 1]
    aside = tmp_path / "a.parquet.bad_rows.jsonl"
    found = [json.loads(line) for line in aside.read_text().splitlines()]
    assert [(row["file"], row["row"]) for row in found] == [(str(file), 1), (str(file), 3)]
    assert "out of range" in found[0]["reason"]
    assert "does not decode" in found[1]["reason"]
    (line,) = logged
    assert "2 of 5 rows" in line and str(aside) in line


def test_skip_without_a_good_row_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [5, 6])
    with pytest.raises(DataError, match=r"no row is left, all 2 are bad .*bad_rows.jsonl\); the first: .*row 0"):
        list(iter_rows(file, STYLE, "skip"))


def test_sets_that_are_empty_missing_or_not_parquet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; expected a Parquet file .*check the path"):
        iter_rows(tmp_path / "nowhere", STYLE)
    with pytest.raises(DataError, match=r"is an empty set: it holds no row, because no file in it ends in .parquet"):
        iter_rows(tmp_path, STYLE)
    schema = pa.schema({"image": pa.binary(), "style": pa.int64()})
    pq.write_table(schema.empty_table(), tmp_path / "empty.parquet")
    with pytest.raises(DataError, match=r"empty.parquet is an empty set: it holds no row"):
        iter_rows(tmp_path / "empty.parquet", STYLE)
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(DataError, match=r"text.parquet cannot be read as Parquet, from row 0 on .*ctrl_ray.label"):
        iter_rows(tmp_path / "text.parquet", STYLE)


def test_a_damaged_file_names_the_row_where_it_breaks(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [0] * 6)
    data = bytearray(file.read_bytes())
    start = pq.ParquetFile(file).metadata.row_group(1).column(0).data_page_offset
    start = min(start, pq.ParquetFile(file).metadata.row_group(1).column(0).dictionary_page_offset or start)
    data[start : start + 40] = b"\xff" * 40
    file.write_bytes(data)
    with pytest.raises(DataError, match=r"a.parquet cannot be read from row 3 on (?s:.)*damaged"):
        list(iter_rows(file, STYLE))


def test_files_must_agree_on_their_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [0], prompts=["x"])
    write(tmp_path / "b.parquet", [0])
    with pytest.raises(DataError, match=r"b.parquet, every row: .*expected the same columns in every file"):
        iter_rows(tmp_path, STYLE)


def test_image_size_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"image_size is \(0, 8\)"):
        iter_rows(write(tmp_path / "a.parquet", [0]), STYLE, image_size=(0, 8))


def test_images_of_different_size_need_image_size(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", [0, 0], images={1: encode(pixels(16, 24))})
    with pytest.raises(DataError, match=r"row 1 .*16 × 24 pixels.*first image of the set is 8 × 12"):
        list(iter_rows(file, STYLE))
    assert [row["image"].shape for row in iter_rows(file, STYLE, image_size=(8, 8))] == [(8, 8, 3)] * 2


def test_reading_does_not_hold_the_file_in_memory(tmp_path: Path) -> None:
    image = encode(pixels(128, 128))  # noise: about 50 kB
    pq.write_table(pa.table({"image": [image] * 400}), tmp_path / "a.parquet", use_dictionary=False, write_batch_size=8)
    before = pa.default_memory_pool().bytes_allocated()
    tracemalloc.start()
    arrow_peak = 0
    for _ in iter_rows(tmp_path / "a.parquet", {}):
        arrow_peak = max(arrow_peak, pa.default_memory_pool().bytes_allocated() - before)
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert arrow_peak + python_peak < 0.5 * 400 * len(image)


def test_distinct_prompts_in_their_first_order(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", [0] * 4, prompts=["b", "a", "b", "c"])
    write(tmp_path / "b.parquet", [0] * 2, prompts=["a", "d"])
    assert read_prompts_column(tmp_path) == ("b", "a", "c", "d")


def test_prompts_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"p.parquet, row 1 .*prompt is missing"):
        read_prompts_column(write(tmp_path / "p.parquet", [0, 0], prompts=["a", None]))
    with pytest.raises(DataError, match=r"n.parquet, every row: column 'prompt' is missing.*--prompts"):
        read_prompts_column(write(tmp_path / "n.parquet", [0]))


def test_equal_shares() -> None:
    values = np.arange(1, 101, dtype=float)
    thresholds = equal_share_thresholds(values, 4)
    assert thresholds == (25.75, 50.5, 75.25)
    assert class_shares(values, thresholds) == (0.25, 0.25, 0.25, 0.25)


@pytest.mark.parametrize("num_values", range(2, 12))
@pytest.mark.parametrize("num_classes", [2, 3, 4, 7])
def test_no_class_is_empty(num_values: int, num_classes: int) -> None:
    draw = np.random.default_rng(num_values)
    for values in (draw.normal(size=num_values), np.arange(num_values), draw.integers(0, 3, num_values)):
        thresholds = equal_share_thresholds(values, num_classes)
        shares = class_shares(values, thresholds)
        assert min(shares) > 0 and len(shares) <= num_classes and list(thresholds) == sorted(set(thresholds))
        assert len(shares) > 1 or len(np.unique(values)) == 1


def test_borders_are_rounded_only_where_the_classes_stay() -> None:
    assert equal_share_thresholds(np.array([1.0, 1234.56789]), 2) == (617.784,)
    close = np.array([1.0, 1.0 + 1e-9])
    assert class_shares(close, equal_share_thresholds(close, 2)) == (0.5, 0.5)


def test_equal_values_make_fewer_classes() -> None:
    assert equal_share_thresholds(np.full(10, 3.0), 4) == ()
    thresholds = equal_share_thresholds(np.array([0.0] * 9 + [1.0]), 4)
    assert all(share > 0 for share in class_shares(np.array([0.0] * 9 + [1.0]), thresholds))


def test_summary_counts_integer_labels_only() -> None:
    labels = summarise(np.array([0, 2, 2, 1]))
    assert labels.class_counts == {0: 1, 1: 1, 2: 2}
    numbers = summarise(np.array([4.0, 1.0, 2.0, 3.0, 5.0]))
    assert (numbers.minimum, numbers.quartiles, numbers.maximum) == (1.0, (2.0, 3.0, 4.0), 5.0)
    assert numbers.class_counts == {}
