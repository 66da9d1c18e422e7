"""True values of an image, measured and not learned: the JPEG size, the colourfulness, or a function of the user's.

An oracle takes one PIL image and returns one finite number. One that has a parameter `prompt` (without a default) is told the
image's prompt too, for what depends on both: a threshold for each prompt, or how well the image matches it. No torch here.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import PurePath
from typing import Any

import numpy as np
from PIL import Image

from ctrl_ray.config.paths import CLIP_HEAD
from ctrl_ray.errors import ConfigError, DataError

Oracle = Callable[..., float]
"""One image in, one finite number out; see `needs_prompt`."""

JPEG_QUALITY = 95
"""Pillow's `quality` for `jpeg_size`."""


_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image upright, by its EXIF orientation."""


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as a viewer shows it on white paper: 8-bit RGB, upright, without metadata.

    EXIF orientation is applied (where the EXIF block can be read), transparency is laid over white, 16-bit grey keeps its
    upper 8 bits, real numbers are taken as 0 to 1 where none is above 1, and of an animation the current frame is taken. An
    RGB image keeps its pixels.
    """
    upright = _upright(image)
    if upright.mode.startswith("I"):
        grey = np.clip(np.asarray(upright).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        upright = Image.fromarray(grey)
    if upright.mode == "F":
        numbers = np.nan_to_num(np.asarray(upright), nan=0.0)
        scale = 255.0 if numbers.max() <= 1 else 1.0
        upright = Image.fromarray(np.clip(numbers * scale, 0, 255).round().astype(np.uint8))
    if upright.mode == "LAB":
        from PIL import ImageCms

        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        upright = ImageCms.profileToProfile(upright, lab, srgb, outputMode="RGB") or upright
    if upright.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in upright.info:
        opaque = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", opaque.size, (255, 255, 255, 255)), opaque)
    rgb = upright.convert("RGB")
    if rgb is image:
        rgb = image.copy()
    rgb.info = {}
    return rgb


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF says, or as it is where that says nothing that can be read."""
    image.load()  # of a TIFF Pillow turns the pixels here, and some formats hold their EXIF after the pixels
    try:
        turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # an EXIF block may hold anything
        turn = None
    return image if turn is None else image.transpose(turn)


def jpeg_size(image: Image.Image) -> float:
    """Bytes of the image as a JPEG file: Pillow, quality 95, its default subsampling, no optimisation, no metadata.

    The method's example of an exact label ("compressibility"). Any mode is taken as RGB first, see `to_rgb`.
    """
    buffer = io.BytesIO()
    to_rgb(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return float(buffer.tell())


def colourfulness(image: Image.Image) -> float:
    """Colourfulness of natural images after Hasler and Süsstrunk (2003), on RGB values 0 to 255.

    With rg = R - G and yb = (R + G) / 2 - B over all pixels,
    M = sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2). 0 for a grey image; above 100 is garish.
    """
    red, green, blue = np.moveaxis(np.asarray(to_rgb(image), dtype=np.float64), -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    return math.sqrt(rg.var() + yb.var()) + 0.3 * math.hypot(rg.mean(), yb.mean())


ORACLES: dict[str, Oracle] = {"jpeg_size": jpeg_size, "colourfulness": colourfulness}
"""The oracles that ship, by name."""

_KINDS = {CLIP_HEAD: "ctrl_ray.classifiers.clip_head"}
"""Oracles that a file makes, as 'KIND:FILE': the module whose `load(FILE)` returns one. It is imported by its name, as a
user's module is, so that nothing here needs torch."""

UNITS: dict[str, str] = {"jpeg_size": "bytes", "colourfulness": ""}
"""Unit of each shipped oracle's number; "" = none."""


def control_name(oracle: str) -> str:
    """What the control of an oracle is called, and its column: 'my_module:my_oracle' becomes 'my_oracle', and
    'clip_head:heads/aesthetic.safetensors' 'aesthetic'."""
    kind, _, spec = oracle.partition(":")
    return PurePath(spec.partition("@")[0]).stem if kind in _KINDS else oracle.rpartition(":")[2]


def load_oracle(name: str) -> Oracle:
    """The oracle called `name`: one of `ORACLES`, 'clip_head:FILE', or 'module:function'; modules of the working directory are
    found.

    Raises ConfigError when there is no such oracle, its module does not import, the function is not one, or the file cannot
    be used.
    """
    if name in ORACLES:
        return ORACLES[name]
    kind, _, spec = name.partition(":")
    if kind in _KINDS and spec:
        made: Oracle = importlib.import_module(_KINDS[kind]).load(spec)
        return made
    module_name, colon, function = name.partition(":")
    if not colon or not module_name or not function:
        near = difflib.get_close_matches(name, ORACLES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"oracle {name!r} is unknown; expected one of {sorted(ORACLES)} or 'my_module:my_oracle', a function of "
            f"yours from a PIL image (and its prompt, where it has a parameter 'prompt') to a number{hint}"
        )
    if module_name.endswith(".py"):
        stem = PurePath(module_name).stem
        raise ConfigError(
            f"oracle {name!r} names a file; expected its module: {stem}:{function}, with {stem}.py in the working "
            f"directory ({os.getcwd()}) or on PYTHONPATH"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"oracle {name!r}: module {module_name!r} does not import ({type(error).__name__}: {error}); put "
            f"{module_name}.py into the working directory ({os.getcwd()}) or on PYTHONPATH, and check that it imports"
        ) from error
    oracle = getattr(module, function, None)
    if not callable(oracle):
        functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(function, functions, n=3) or functions[:10]
        raise ConfigError(
            f"oracle {name!r}: module {module_name!r} ({getattr(module, '__file__', '?')}) has no function "
            f"{function!r}; expected a function from a PIL image to a number; the module has {near}"
        )
    return oracle


def needs_prompt(oracle: Oracle) -> bool:
    """Whether the oracle has a parameter `prompt` without a default: it judges an image with its prompt."""
    try:
        asked = inspect.signature(oracle).parameters.get("prompt")
    except (TypeError, ValueError):  # a function of an extension module may not say
        return False
    return asked is not None and asked.default is asked.empty


def is_told_prompt(name: str | None) -> bool:
    """`needs_prompt` of the oracle called `name`; None: no oracle. Raises what `load_oracle` does."""
    return name is not None and needs_prompt(load_oracle(name))


def measure(oracle: Oracle, images: np.ndarray, prompts: Sequence[str] | None = None) -> np.ndarray:
    """The oracle's value of every image.

    images: uint8 (N, H, W, 3). prompts: N, for an oracle that needs them. Returns float64 (N,), in the oracle's unit. Raises
    DataError when the array is of another kind, or when the oracle raises, returns anything but a finite number, or needs
    a prompt that is not there; the message says for which image.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise DataError(
            f"images to measure are {images.dtype} of shape {images.shape}; expected uint8 of shape (N, H, W, 3)"
        )
    values = np.empty(len(images), dtype=np.float64)
    for index, image in enumerate(images):
        try:
            prompt = None if prompts is None else prompts[index]
            values[index] = measure_one(oracle, Image.fromarray(image), prompt)
        except DataError as error:
            raise DataError(f"image {index} of {len(images)}: {error}") from error
    return values


def measure_one(oracle: Oracle, image: Image.Image, prompt: str | None = None) -> float:
    """The oracle's value of one image; DataError when it raises, returns anything but a finite number, or needs a prompt and
    there is none."""
    name = getattr(oracle, "__name__", str(oracle))
    told = {"prompt": prompt} if needs_prompt(oracle) else {}
    if None in told.values():
        raise DataError(
            f"oracle {name!r} judges an image with its prompt, but this image has no prompt; give the prompts, or an oracle "
            "without the parameter 'prompt'"
        )
    try:
        value: Any = oracle(image.copy(), **told)  # an oracle may draw on what it is given
    except (Exception, SystemExit) as error:
        raise DataError(
            f"oracle {name!r} failed ({type(error).__name__}: {error}); it must return a number for every image"
        ) from error
    if isinstance(value, np.ndarray | np.generic) and value.size == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise DataError(f"oracle {name!r} returned {value!r}; expected a finite number; correct the function")
    return float(value)
