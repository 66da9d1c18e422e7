"""The picture of before and after: the same noise and prompt, one line above the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ctrl_ray.canvas import INK, new_figure

RIGHT, WRONG = "#2f7d4f", "#b5402a"
_CELL, _GAP, _CAPTION, _HEADER, _MARGIN = 128, 6, 36, 34, 76
_PIXELS_PER_INCH = 130  # that of the saved file: one pixel of the canvas is one of the PNG

_PROMPT_LENGTH = 22
_LETTER = 8.5
"""Pixels of a title's letter: long ones widen the margin."""


@dataclass(frozen=True, slots=True, eq=False)
class GridLine:
    """One line of images under a class's header."""

    title: str
    """'before' or 'after'; written at the left."""
    images: Sequence[np.ndarray]
    """(H, W, 3) uint8 each."""
    captions: Sequence[str]
    """Beneath each image, such as the measured value."""
    prompts: Sequence[str]
    """Beneath the captions, cut to the width of an image."""
    right: Sequence[bool | None]
    """Whether it is of the class asked for; None: not judged."""


def plot_sample_grid(path: Path, rows: Sequence[tuple[str, Sequence[GridLine]]]) -> Path | None:
    """A header and its lines for each class. Captions are marked ✓ or ✗ by whether the class was hit; None if empty."""
    lines = [line for _, group in rows for line in group]
    columns = max((len(line.images) for line in lines), default=0)
    if columns == 0:
        return None
    margin = max(_MARGIN, round(2 * _GAP + _LETTER * max(len(line.title) for line in lines)))
    width = margin + columns * (_CELL + _GAP)
    height = len(rows) * _HEADER + len(lines) * (_CELL + _CAPTION) + _GAP
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    with new_figure(path, width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH, layout=None) as figure:
        axis = figure.add_axes((0, 0, 1, 1))
        top = 0
        for header, group in rows:
            axis.text(_GAP, top + _HEADER - 9, header, fontsize=9, fontweight="bold", va="baseline", color=INK)
            top += _HEADER
            for line in group:
                axis.text(_GAP, top + _CELL / 2, line.title, fontsize=8.5, va="center")
                for column, image in enumerate(line.images):
                    left = margin + column * (_CELL + _GAP)
                    canvas[top : top + _CELL, left : left + _CELL] = thumbnail(image, _CELL)
                    mark = {True: " ✓", False: " ✗", None: ""}[line.right[column]]
                    colour = {True: RIGHT, False: WRONG, None: INK}[line.right[column]]
                    axis.text(
                        left + _CELL / 2,
                        top + _CELL + 2,
                        line.captions[column] + mark,
                        fontsize=7,
                        ha="center",
                        va="top",
                        color=colour,
                    )
                    prompt = line.prompts[column]
                    short = prompt if len(prompt) <= _PROMPT_LENGTH else prompt[: _PROMPT_LENGTH - 1] + "…"
                    axis.text(left + _CELL / 2, top + _CELL + 17, short, fontsize=6, ha="center", va="top")
                top += _CELL + _CAPTION
        axis.imshow(canvas, interpolation="nearest", aspect="auto", extent=(0, width, height, 0))
        axis.set_axis_off()
    return path


def thumbnail(image: np.ndarray, side: int) -> np.ndarray:
    """The image (H, W, 3) uint8 within a white square of `side` pixels; sharp when enlarged, smooth when reduced."""
    picture = Image.fromarray(image)
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    resized = picture.resize(size, Image.Resampling.BOX if scale >= 1 else Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), "white")
    square.paste(resized, ((side - size[0]) // 2, (side - size[1]) // 2))
    return np.asarray(square)
