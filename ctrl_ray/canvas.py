"""What every figure is drawn on: one style, text as text, and fonts that have its letters.

    with new_figure(path, 5, 3) as figure:
        figure.subplots().set_title("price class $$")

A dollar sign starts no mathematics. A letter that the style's font lacks comes from another installed font that has it; where
none has, a box is drawn, and one line says so.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.text import Text

BEFORE, AFTER = "#8b929c", "#1d5f9e"
INK, FAINT = "#22272e", "#d9dde3"
_DPI = 130
_FONT = "DejaVu Sans"
"""Comes with matplotlib."""
_STYLE: Any = {
    "font.family": _FONT,
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_BOXES_ONLY = ("last resort", "lastresort", "blank", "notdef")
"""Parts of the names of fonts that have every letter and show none."""
_said: list[str] = []
"""The letters of the one line about missing letters, once it is said."""
_logger = logging.getLogger("ctrl_ray")


@contextmanager
def new_figure(
    path: Path,
    width: float,
    height: float,
    *,
    layout: Literal["constrained"] | None = "constrained",
    say: Callable[[str], None] | None = None,
) -> Iterator[Figure]:
    """A figure of width × height inches in the report's style, written to `path` on leaving. No global state.

    say: Gets the line about letters that no installed font has, once in a process; None: the log.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout=layout)
        FigureCanvasAgg(figure)
        yield figure
        with _quiet_about_fonts():
            missing = _choose_fonts(figure)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=_DPI, facecolor="white")
    _say_once(missing, say or _logger.warning)


def shortened(text: str, most: int) -> str:
    """`text`, or its beginning and an ellipsis: `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"


@contextmanager
def _quiet_about_fonts() -> Iterator[None]:
    """Inside, matplotlib says nothing of a letter, a weight or a script that a font lacks."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")
            warnings.filterwarnings("ignore", message="Matplotlib currently does not support .* natively")
            yield
    finally:
        logger.setLevel(level)


def _choose_fonts(figure: Figure) -> str:
    """Give every text of the figure fonts that have its letters; returns the letters that no installed font has."""
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_ticklabels(which="both")  # their texts are made when they are asked for
    missing = ""
    for text in figure.findobj(Text):
        font = text.get_fontproperties()
        lacking = "".join(sorted(_letters(text.get_text()) - _has(font_manager.findfont(font))))
        if lacking:
            families, left = _families_with(lacking, font.get_weight())
            text.set_fontfamily([*font.get_family(), *families])
            missing += left
    return missing


def _letters(text: str) -> frozenset[str]:
    return frozenset() if text.isascii() else frozenset(text) - {"\n", "\t"}


@functools.lru_cache(maxsize=512)
def _has(file: str) -> frozenset[str]:
    """The characters that a font file has a glyph for; none where it cannot be read."""
    try:
        return frozenset(map(chr, font_manager.get_font(file).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@functools.lru_cache(maxsize=512)
def _families_with(letters: str, weight: Any) -> tuple[tuple[str, ...], str]:
    """Installed families that together have as many of `letters` as any, the fewest that do, and the letters left over."""
    names = {entry.name for entry in font_manager.fontManager.ttflist}
    names = {name for name in names if not any(part in name.lower() for part in _BOXES_ONLY)}
    found = {
        name: _has(font_manager.findfont(FontProperties(family=[name], weight=weight)))
        for name in sorted(names, key=lambda name: ("Sans" not in name, name))
    }
    chosen: list[str] = []
    left = frozenset(letters)
    while left and found:
        best = max(found, key=lambda name: len(found[name] & left))
        if not found[best] & left:
            break
        chosen.append(best)
        left -= found[best]
    return tuple(chosen), "".join(sorted(left))


def _say_once(letters: str, say: Callable[[str], None]) -> None:
    if not letters or _said:
        return
    _said.extend(sorted(set(letters)))
    some = ", ".join(f"{letter} (U+{ord(letter):04X})" for letter in _said[:5])
    more = f" and {len(_said) - 5} more" if len(_said) > 5 else ""
    say(
        f"figures: no installed font has {some}{more}, so figures show boxes in their place; install a font that has them, "
        "such as Noto Sans CJK for Chinese, Japanese and Korean"
    )
