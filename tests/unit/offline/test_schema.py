"""One row, one fault: what each message says."""

import io
import struct
import zlib

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import ConfigError, DataError
from ctrl_ray.offline.schema import (
    RowError,
    check_columns,
    check_controls,
    check_on_bad_row,
    check_row,
    handle_bad_rows,
)

SIZE = ControlConfig(thresholds=(1500.0, 1700.0, 1900.0))
STYLE = ControlConfig(classes=("photo", "drawing", "other"))


def encode(pixels: np.ndarray, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def pixels(height: int = 8, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("value", ["drawing", 1, 1.0, True])
def test_labels_as_people_write_them(value: object) -> None:
    assert check_row({"image": encode(pixels()), "style": value}, {"style": STYLE})["style"] == 1


def test_images_as_hugging_face_stores_them() -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert check_columns(pa.schema({"image": image}), "d.parquet", {}) == ("image",)
    row = check_row({"image": {"bytes": encode(pixels()), "path": "a.png"}}, {})
    assert np.array_equal(row["image"], pixels())
    with pytest.raises(DataError, match=r"'image' is of type string; expected the bytes .*python -m ctrl_ray.label"):
        check_columns(pa.schema({"image": pa.string()}), "d.parquet", {})


@pytest.mark.parametrize("name", ["text", "caption", "Caption"])
def test_captions_of_another_name_are_not_passed_over(name: str) -> None:
    schema = pa.schema({"image": pa.binary(), name: pa.string()})
    assert check_columns(schema, "d.parquet", {}) == ("image",)
    with pytest.raises(
        DataError, match=rf"'prompt' is missing; .*if column '{name}' holds them, rename it to 'prompt'"
    ):
        check_columns(schema, "d.parquet", {}, needs_prompts=True)
    numbers = pa.schema({"image": pa.binary(), name: pa.int64()})
    with pytest.raises(DataError, match=r"'prompt' is missing; the file has [^;]*; label again"):
        check_columns(numbers, "d.parquet", {}, needs_prompts=True)


def test_a_good_row_keeps_its_pixels_and_gets_its_classes() -> None:
    raw = {"image": encode(pixels()), "prompt": "a cat", "jpeg_size": 1700, "style": 2}
    row = check_row(raw, {"jpeg_size": SIZE, "style": STYLE})
    assert np.array_equal(row.pop("image"), pixels())
    assert row == {"prompt": "a cat", "jpeg_size": 2, "jpeg_size_value": 1700.0, "style": 2}


@pytest.mark.parametrize(
    ("value", "label"),
    [(0, 0), (1499.999, 0), (1500.0, 1), (1699.0, 1), (1700.0, 2), (1899.9, 2), (1900.0, 3), (9e9, 3)],
)
def test_a_class_starts_at_its_threshold(value: float, label: int) -> None:
    assert check_row({"image": encode(pixels()), "jpeg_size": value}, {"jpeg_size": SIZE})["jpeg_size"] == label


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"style": 3}, r"control 'style' \(column 'style'\) is 3, .*out of range.*0 to 2 \(photo, drawing, other\)"),
        ({"style": -1}, r"is -1, .*out of range"),
        ({"style": "painting"}, r"is 'painting', .*out of range; expected .* 0 to 2 \(photo, drawing, other\)"),
        ({"style": 0.5}, r"is 0.5, .*out of range; .*give the control thresholds if it is a measured number"),
        ({"style": float("nan")}, r"control 'style' \(column 'style'\) has no value"),
        ({"style": None}, r"control 'style' \(column 'style'\) has no value; fill it in"),
        ({"jpeg_size": float("nan")}, r"control 'jpeg_size' .* is nan; expected a finite number"),
        ({"jpeg_size": float("inf")}, r"is inf; expected a finite number"),
        ({"prompt": None}, r"prompt is missing; expected a string"),
        ({"image": None}, r"image is empty"),
        ({"image": b""}, r"image is empty"),
        (
            {"image": b"not an image"},
            r"\(12 bytes\) does not decode: its first bytes are those of none of .*PNG.*replace",
        ),
        ({"image": encode(pixels(64, 64))[:2000]}, r"\(2000 bytes\) does not decode: .*truncated"),
        ({"image": png_claiming(10_000, 10_000)}, r"does not decode: it claims 10000 × 10000 pixels"),
        ({"image": png_claiming(60_000, 60_000)}, r"does not decode: .*decompression bomb"),
        ({"image": encode(pixels(), "EPS")}, r"does not decode: its first bytes"),
        (
            {"image": {"bytes": None, "path": "a.png"}},
            r"names a file \('a.png'\) and does not hold its bytes; label the",
        ),
        ({"image": {"bytes": None, "path": None}}, r"image is empty"),
        ({"image": encode(pixels(9, 12))}, r"is 9 × 12 pixels .*first image of the set is 8 × 12.*give image_size"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_row_says_why_and_how_to_go_on(changes: dict[str, object], reason: str) -> None:
    raw = {"image": encode(pixels()), "prompt": "a cat", "jpeg_size": 1.0, "style": 0, **changes}
    with pytest.raises(RowError, match=reason) as caught:
        check_row(raw, {"jpeg_size": SIZE, "style": STYLE}, expected_size=(8, 12))
    assert "--on-bad-row skip" in str(caught.value)


def test_image_size_scales_to_cover_and_crops_the_middle() -> None:
    wide = np.zeros((4, 12, 3), dtype=np.uint8)
    wide[:, 4:8] = 255  # the middle third is white: it is what a square crop shows
    row = check_row({"image": encode(wide)}, {}, image_size=(4, 4))
    assert row["image"].shape == (4, 4, 3)
    assert row["image"].min() == 255


def test_every_documented_format_decodes() -> None:
    flat = np.full((8, 8, 3), 100, dtype=np.uint8)
    for format in ("PNG", "JPEG", "WEBP", "BMP", "GIF"):
        image = check_row({"image": encode(flat, format)}, {})["image"]
        assert np.abs(image.astype(int) - 100).max() <= 3, format


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert check_row({"image": buffer.getvalue()}, {})["image"][0, 0].tolist() == [255, 0, 0]


def schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema({"image": pa.binary(), **columns})


def test_columns_to_read_leave_out_what_is_not_asked_for() -> None:
    found = check_columns(
        schema(prompt=pa.large_string(), jpeg_size=pa.int32(), x=pa.string()), "f", {"jpeg_size": SIZE}
    )
    assert found == ("image", "prompt", "jpeg_size")


def test_a_control_can_read_a_column_of_another_name() -> None:
    control = ControlConfig(thresholds=(1.0,), column="size")
    assert check_columns(schema(size=pa.float32()), "f", {"jpeg_size": control}) == ("image", "size")
    assert check_row({"image": encode(pixels()), "size": 1.0}, {"jpeg_size": control})["jpeg_size"] == 1


@pytest.mark.parametrize(
    ("found", "control", "message"),
    [
        (
            schema(jpegsize=pa.int64()),
            SIZE,
            r"f.parquet, every row: column 'jpeg_size' of control 'jpeg_size' is unknown",
        ),
        (schema(jpegsize=pa.int64()), SIZE, r"the file has \['image', 'jpegsize'\]; did you mean 'jpegsize'\? Rename"),
        (schema(jpeg_size=pa.string()), SIZE, r"f.parquet, every row: .* is of type string; expected numbers"),
        (
            schema(jpeg_size=pa.date32()),
            STYLE,
            r"is of type date32\[day\]; expected integer labels from 0 to 2, or class names; give .* thresh",
        ),
        (pa.schema({"jpeg_size": pa.int64()}), SIZE, r"column 'image' is unknown"),
        (pa.schema({"image": pa.string()}), SIZE, r"column 'image' is of type string; expected the bytes"),
        (schema(prompt=pa.int64(), jpeg_size=pa.int64()), SIZE, r"column 'prompt' is of type int64; expected strings"),
    ],
)
def test_a_wrong_column_is_named(found: pa.Schema, control: ControlConfig, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_columns(found, "f.parquet", {"jpeg_size": control})


def test_controls_that_cannot_be_read() -> None:
    with pytest.raises(ConfigError, match="'image' and 'prompt' are taken"):
        check_controls({"image": SIZE})
    with pytest.raises(ConfigError, match="neither thresholds nor classes"):
        check_controls({"style": ControlConfig()})
    with pytest.raises(ConfigError, match=r"on_bad_row is 'ignore'; expected 'error' or 'skip'"):
        check_on_bad_row("ignore")


def test_an_empty_set_is_an_error_even_when_skipping() -> None:
    with pytest.raises(DataError, match=r"d.parquet is an empty set: it holds no row"):
        handle_bad_rows([], 0, "skip", "unused", source="d.parquet")
