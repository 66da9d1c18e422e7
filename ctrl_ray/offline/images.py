"""From encoded bytes, which may be anything, to an RGB image, or to a reason why not."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from ctrl_ray.oracles import to_rgb

MAX_PIXELS = 89_478_485
"""Images with more pixels are refused before they are decoded (a small file can claim to be a huge image)."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
"""Pillow's names of the formats that are decoded; no other decoder ever sees the bytes."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
"""File names, in lower case, that are taken for images."""


class UndecodableImageError(ValueError):
    """The bytes are not an image we read; the text says why."""


def decode_image(data: bytes, image_size: tuple[int, int] | None = None) -> Image.Image:
    """The image that `data` encodes (of an animation: its first frame), as upright RGB on white (`to_rgb`).

    With image_size = (height, width) it is scaled to cover that size and cropped around the centre; an image of that
    size keeps its pixels. Raises UndecodableImageError.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise UndecodableImageError(f"it claims {width} × {height} pixels, more than {MAX_PIXELS}")
            image = to_rgb(opened)
    except UndecodableImageError:
        raise
    except Exception as error:  # decoders fail in many ways on broken bytes
        raise UndecodableImageError(_first_line(error)) from error
    return cover_and_crop(image, image_size)


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
        return f"its first bytes are those of none of the formats {', '.join(FORMATS)}"
    return text[0] if text else type(error).__name__
