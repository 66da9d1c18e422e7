"""Bytes of images that were cut, changed or never were images; rows of data sets that other tools wrote."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from ctrl_ray.config import ControlConfig
from ctrl_ray.offline.images import MAX_PIXELS, UndecodableImageError, decode, decode_image, to_png
from ctrl_ray.offline.reading import iter_rows, read_prompts_column
from tests.fuzz.command import works_or_is_refused


def _encoded(form: str, mode: str = "RGB", **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def _with_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _encoded("JPEG", exif=exif)


SEEDS = [
    _encoded(form)
    for form in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "TGA", "PPM", "ICO", "JPEG2000", "SGI", "PCX")
]
SEEDS += [_encoded("PNG", mode) for mode in ("P", "L", "LA", "RGBA", "1", "I;16")]
SEEDS += [_encoded("TIFF", mode) for mode in ("CMYK", "LAB", "F", "I;16")]
SEEDS.append(_with_exif())


@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), max_size=4),
    st.floats(0, 1) | st.just(1.0),
)
def test_pictures_that_were_changed(data: bytes, changes: list[tuple[float, bytes]], kept: float) -> None:
    for share, other in changes:
        place = int(share * len(data))
        data = data[:place] + other + data[place + len(other) :]
    _decodes_or_says_why(data[: int(kept * len(data))])


@given(st.binary(max_size=300))
@example(b"\0" * 300)
@example(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n")
def test_bytes_that_are_no_picture(data: bytes) -> None:
    _decodes_or_says_why(data)


def _decodes_or_says_why(data: bytes) -> None:
    try:
        found = decode(data)
    except UndecodableImageError as error:
        assert str(error) and "\n" not in str(error)
        return
    assert found.image.mode == "RGB" and 0 < found.image.width * found.image.height <= MAX_PIXELS
    assert decode(to_png(found.image)).image.tobytes() == found.image.tobytes()
    assert decode_image(data, (5, 7)).size == (7, 5)


IMAGES = st.sampled_from([*SEEDS[:2], b"", b"no picture", None])
COLUMNS: dict[str, tuple[pa.DataType, st.SearchStrategy[Any]]] = {
    "bytes": (pa.binary(), IMAGES),
    "struct": (
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        st.none() | st.fixed_dictionaries({"bytes": IMAGES, "path": st.none() | st.just("a.png")}),
    ),
    "other struct": (pa.struct([("path", pa.string())]), st.just({"path": "a.png"})),
    "text": (pa.string(), st.none() | st.text(max_size=5)),
    "texts": (pa.list_(pa.string()), st.lists(st.text(max_size=3), max_size=2)),
    "category": (pa.dictionary(pa.int32(), pa.string()), st.none() | st.sampled_from(["a", "b"])),
    "integer": (pa.int64(), st.none() | st.integers(-2, 4) | st.just(2**62)),
    "byte": (pa.uint8(), st.integers(0, 3)),
    "number": (pa.float64(), st.none() | st.floats()),
    "half": (pa.float16(), st.floats(width=16).map(np.float16)),
    "boolean": (pa.bool_(), st.none() | st.booleans()),
    "time": (pa.timestamp("s"), st.integers(0, 10)),
    "null": (pa.null(), st.none()),
}
KINDS = st.sampled_from(list(COLUMNS))
CONTROLS = {
    "integer": ControlConfig(classes=("a", "b", "c"), column="label"),
    "number": ControlConfig(thresholds=(0.0, 1.0), column="label"),
}


@given(
    st.data(),
    st.sampled_from(["bytes", "struct"]) | KINDS,
    st.none() | st.just("text") | KINDS,
    KINDS,
    st.integers(0, 3),
)
def test_rows_of_data_sets(data: st.DataObject, image: str, prompt: str | None, label: str, num_rows: int) -> None:
    kinds = {"image": image, "label": label, **({} if prompt is None else {"prompt": prompt})}
    columns = {}
    for name, kind in kinds.items():
        type_, values = COLUMNS[kind]
        rows = data.draw(st.lists(values, min_size=num_rows, max_size=num_rows))
        try:
            columns[name] = pa.array(rows, type_)
        except (pa.ArrowException, UnicodeEncodeError):  # half a surrogate pair: no file holds it
            return
    control = data.draw(st.sampled_from(list(CONTROLS)))
    on_bad_row: Any = data.draw(st.sampled_from(["error", "skip"]))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.parquet"
        pq.write_table(pa.table(columns), file)
        found = works_or_is_refused(
            lambda: list(iter_rows(file, {control: CONTROLS[control]}, on_bad_row)), "data.parquet"
        )
        prompts = works_or_is_refused(lambda: read_prompts_column(file), "data.parquet")
    for row in found or ():
        assert row["image"].dtype == np.uint8 and row["image"].shape == (12, 10, 3)
        assert 0 <= row[control] < CONTROLS[control].num_classes and isinstance(row["prompt"], str)
    assert prompts is None or all(isinstance(text, str) for text in prompts)


@given(st.binary(max_size=200), st.integers(0, 1000))
def test_files_that_are_no_parquet(other: bytes, place: int) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"image": [SEEDS[0]], "label": [1], "prompt": ["a cat"]}), buffer)
    whole = buffer.getvalue()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.parquet"
        for data in (other, whole[:place], whole[:place] + other[:4] + whole[place + len(other[:4]) :]):
            file.write_bytes(data)
            works_or_is_refused(lambda: list(iter_rows(file, {"integer": CONTROLS["integer"]})), "data.parquet")
            works_or_is_refused(lambda: read_prompts_column(file), "data.parquet")
