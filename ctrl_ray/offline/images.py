"""From encoded bytes, which may be anything, to an RGB image, or to a reason why not."""

from __future__ import annotations

import functools
import importlib
import io
import struct
import warnings
import zlib
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ctrl_ray.oracles import to_rgb

MAX_PIXELS = 89_478_485
"""Images with more pixels are refused before they are decoded (a small file can claim to be a huge image)."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""Pillow's names of the formats that messages name. All others that Pillow and its plugins read are taken too."""

PLUGINS = {".heic": "pillow-heif", ".heif": "pillow-heif", ".avif": "pillow-heif", ".jxl": "pillow-jxl-plugin"}
"""What to install for files that this Pillow does not read."""

_NEVER = frozenset({"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
"""EPS starts another program; of the others Pillow knows the first bytes and reads no pixels."""
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")
_DARK = 4096


class UndecodableImageError(ValueError):
    """The bytes are not an image we read; the text says why."""


class Decoded(NamedTuple):
    """An image and what a person should know about it."""

    image: Image.Image
    """RGB, upright, on white."""
    looks_unscaled: bool
    """Its 16-bit values stay below 4096, as 12-bit data that nobody scaled: it is nearly black."""
    odd_metadata: bool
    """Its metadata cannot be read; other programs may refuse the file for it."""


@functools.cache
def every_format() -> tuple[str, ...]:
    """Pillow's names of all formats that are decoded, those of the plugins that are installed included."""
    for plugin in ("pillow_heif", "pillow_avif", "pillow_jxl"):
        with suppress(Exception):  # one that is not there, or does not fit this Pillow
            module = importlib.import_module(plugin)
            getattr(module, "register_heif_opener", lambda: None)()
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NEVER)


@functools.cache
def suffixes() -> tuple[str, ...]:
    """File names that are taken for images end so, in lower case."""
    formats = {*every_format(), "MPO"}  # two JPEG pictures in one file: Pillow opens it as JPEG
    return tuple(sorted(suffix for suffix, name in Image.registered_extensions().items() if name in formats))


def decode_image(data: bytes, image_size: tuple[int, int] | None = None) -> Image.Image:
    """The image that `data` encodes (of an animation: its first frame), as upright RGB on white (`to_rgb`).

    With image_size = (height, width) it is scaled to cover that size and cropped around the centre; an image of that
    size keeps its pixels. Metadata never costs the picture: what cannot be read of it is left out. Raises
    UndecodableImageError.
    """
    return cover_and_crop(decode(data).image, image_size)


def decode(data: bytes) -> Decoded:
    """`decode_image`, and what a person should know about the image."""
    if not data:
        raise UndecodableImageError("it is empty")
    try:
        return _decode(data)
    except UndecodableImageError:
        raise
    except Exception as error:  # decoders fail in many ways on broken bytes
        raise UndecodableImageError(_first_line(error)) from error


def _decode(data: bytes) -> Decoded:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a decoder's remarks on metadata: no one can act on them
        try:
            return _read(data, FORMATS)
        except UndecodableImageError:
            raise
        except Exception as error:
            if data.startswith(_PNG):
                with suppress(Exception):
                    return _read(_without_texts(data), FORMATS)._replace(odd_metadata=True)
            if isinstance(error, Image.UnidentifiedImageError):
                return _read(data, every_format())
            raise


def _read(data: bytes, formats: tuple[str, ...]) -> Decoded:
    with Image.open(io.BytesIO(data), formats=formats) as opened:
        width, height = opened.size
        if width * height > MAX_PIXELS:
            raise UndecodableImageError(f"it claims {width} × {height} pixels, more than {MAX_PIXELS}")
        odd = not _exif_is_sound(opened)  # Pillow says so only the first time that it is asked
        image = to_rgb(opened)
        dark = opened.mode.startswith("I") and 255 < int(np.asarray(opened).max()) < _DARK
        return Decoded(image, dark, odd)


def _exif_is_sound(image: Image.Image) -> bool:
    image.load()  # some formats hold it after the pixels
    try:
        image.getexif().tobytes()
    except Exception:  # it may hold anything
        return False
    return True


def _without_texts(png: bytes) -> bytes:
    """The chunks of a PNG that its picture needs: no texts and profiles, which may be too long for Pillow or broken."""
    kept, place = [_PNG], len(_PNG)
    while place + 12 <= len(png):
        length, kind = struct.unpack(">I4s", png[place : place + 8])
        chunk = png[place : place + 12 + length]
        sound = chunk[-4:] == struct.pack(">I", zlib.crc32(chunk[4:-4]))
        if kind in _PNG_KEPT and (sound or kind != b"eXIf"):
            kept.append(chunk)
        place += 12 + length
    return b"".join(kept)


def to_png(image: Image.Image) -> bytes:
    """The image as a PNG file without metadata."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def cover_and_crop(image: Image.Image, image_size: tuple[int, int] | None) -> Image.Image:
    """Scale to cover (height, width) and crop around the centre; None, or the size it has, changes nothing."""
    if image_size is None or image.size == image_size[::-1]:
        return image
    return ImageOps.fit(image, image_size[::-1], method=Image.Resampling.LANCZOS)


def to_array(image: Image.Image) -> np.ndarray:
    """uint8 (H, W, 3) of an RGB image."""
    return np.array(image, dtype=np.uint8)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    if isinstance(error, Image.UnidentifiedImageError):
        return f"its first bytes are those of none of the formats {', '.join(FORMATS)} or others that Pillow reads"
    return text[0] if text else type(error).__name__
