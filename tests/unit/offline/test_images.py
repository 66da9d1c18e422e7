"""Pictures that every viewer shows, decoded; and what stays no picture."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from ctrl_ray.offline.images import UndecodableImageError, decode, decode_image, suffixes, to_png

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(**options: object) -> bytes:
    return encoded(Image.fromarray(PIXELS), "PNG", **options)


def with_chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """A PNG with one more chunk after its header."""
    found = zlib.crc32(kind + body) if checksum is None else checksum
    data = png()
    return data[:33] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", found) + data[33:]


LONG = zlib.compress(b"a recipe of nodes, " * 120_000)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM", "TGA", "JPEG2000", "PCX", "SGI", "QOI"])
def test_whatever_pillow_opens_is_taken(form: str) -> None:
    flat = np.full(PIXELS.shape, (200, 40, 90), dtype=np.uint8)  # one colour: the lossy formats keep it, nearly
    lossless = {"lossless": True} if form == "WEBP" else {}
    image = decode_image(encoded(Image.fromarray(flat), form, **lossless))
    assert image.mode == "RGB" and image.size == (9, 6)
    assert np.abs(np.asarray(image).astype(int) - flat).max() <= 2


@pytest.mark.parametrize("suffix", [".jfif", ".tif", ".tiff", ".jpe", ".avif", ".mpo", ".png", ".jpg"])
def test_names_of_images(suffix: str) -> None:
    assert (suffix in suffixes()) == (suffix in Image.registered_extensions())


@pytest.mark.parametrize("suffix", [".eps", ".ps", ".pdf", ".mpg", ".h5", ".txt", ".csv", ""])
def test_names_of_no_images(suffix: str) -> None:
    assert suffix not in suffixes()


def test_no_program_is_started_for_a_file() -> None:
    """Pillow gives EPS to Ghostscript."""
    with pytest.raises(UndecodableImageError, match="first bytes are those of none of the formats PNG, JPEG"):
        decode_image(encoded(Image.fromarray(PIXELS), "EPS"))


@pytest.mark.parametrize(
    "data",
    [
        with_chunk(b"zTXt", b"workflow\0\0" + LONG),
        with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),
        with_chunk(b"iCCP", b"printer\0\0" + LONG),
        with_chunk(b"tEXt", b"note\0cut", checksum=1),
        with_chunk(b"eXIf", b"MM\0*\0\0", checksum=1),
        png(exif=b"Exif\0\0\x00\x01 no such header"),
    ],
    ids=["long text", "long XMP", "long profile", "broken text", "broken EXIF", "EXIF that is none"],
)
def test_metadata_never_costs_the_picture(data: bytes) -> None:
    found = decode(data)
    np.testing.assert_array_equal(np.asarray(found.image), PIXELS)
    assert found.odd_metadata
    plain = ImageOps.exif_transpose(Image.open(io.BytesIO(to_png(found.image))))
    np.testing.assert_array_equal(np.asarray(plain), PIXELS)


def test_a_png_keeps_its_transparency_when_its_texts_are_left_out() -> None:
    grey = encoded(Image.fromarray(PIXELS[..., 0]), "PNG", transparency=int(PIXELS[0, 0, 0]))
    place = grey.index(b"IDAT") - 4
    long = (
        struct.pack(">I", len(LONG) + 3)
        + b"zTXt"
        + b"w\0\0"
        + LONG
        + struct.pack(">I", zlib.crc32(b"zTXtw\0\0" + LONG))
    )
    assert decode_image(grey[:place] + long + grey[place:]).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_though_another_tag_is_broken(orientation: int) -> None:
    """The resolution unit is stored as a byte where the standard has a short."""
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack(">HHII", 0x0128, 1, 1, 2 << 24)
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", 2) + entries + bytes(4)
    flat, turned = (
        np.arange(6, dtype=np.uint8).reshape(2, 3) * 40,
        decode_image(
            encoded(
                Image.fromarray(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3, 1) * 40, 3, axis=2)),
                "PNG",
                exif=exif,
            )
        ),
    )
    upright = {
        1: flat, 2: flat[:, ::-1], 3: flat[::-1, ::-1], 4: flat[::-1], 5: flat.T, 6: np.rot90(flat, -1),
        7: flat[::-1, ::-1].T, 8: np.rot90(flat),
    }  # fmt: skip
    np.testing.assert_array_equal(np.asarray(turned)[..., 0], upright[orientation])


def test_a_tiff_of_real_numbers_and_one_of_lab_colours() -> None:
    numbers = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)
    assert np.asarray(decode_image(encoded(Image.fromarray(numbers), "TIFF")))[0, :, 0].tolist() == [0, 128, 255, 0]
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    colours = ImageCms.profileToProfile(Image.fromarray(PIXELS), srgb, lab, outputMode="LAB")
    back = np.asarray(decode_image(encoded(colours, "TIFF"))).astype(int)
    assert np.abs(back - PIXELS).max() <= 20, "8-bit Lab keeps colours only so well"


@pytest.mark.parametrize(("most", "unscaled"), [(4095, True), (65535, False), (200, False)])
def test_12_bits_in_16_are_noticed(most: int, unscaled: bool) -> None:
    grey = np.linspace(0, most, 12).astype(np.uint16).reshape(3, 4)
    found = decode(encoded(Image.fromarray(grey), "PNG"))
    assert found.looks_unscaled == unscaled
    np.testing.assert_array_equal(np.asarray(found.image)[..., 0], grey >> 8)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP", "GIF"])
def test_a_cut_picture_is_none(form: str) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encoded(noise, form)
    with pytest.raises(UndecodableImageError):
        decode_image(data[: len(data) // 2])
