"""Figures show text as text, in fonts that have its letters, and say once what they cannot show."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ctrl_ray import canvas
from ctrl_ray.canvas import new_figure, shortened
from ctrl_ray.reporting.figures import plot_confusion

DRAWN_BY_NO_FONT = "\U000e0fff"  # not assigned: no font of any machine has it


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(canvas, "_said", [])
    yield


def _draw(path: Path, text: str, said: list[str]) -> Figure:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with new_figure(path, 3, 2, say=said.append) as figure:
            figure.subplots().set_title(text)
    return figure


@pytest.mark.parametrize("text", ["$", "$$", "$x", r"$\frac{1}{$", "a_b^c", "100 %", r"\alpha", "ß 中"])
def test_text_is_drawn_as_it_stands(tmp_path: Path, text: str) -> None:
    figure = _draw(tmp_path / "figure.png", text, [])
    title = figure.axes[0].title if figure.axes[0].title.get_text() else figure.axes[0]._left_title
    assert title.get_text() == text and not title.get_parse_math()


def test_classes_named_by_dollars_reach_the_axes_of_a_report(tmp_path: Path, figures: dict[str, Figure]) -> None:
    names = ("$", "$$", "a name of a class that is longer than its panel")
    plot_confusion(tmp_path / "confusion.png", names, "$", before=np.eye(3, dtype=int).tolist())
    axis = figures["confusion.png"].axes[0]
    labels = axis.get_xticklabels()
    assert [label.get_text() for label in labels] == ["$", "$$", "a name of a class that is l…"]
    assert not any(text.get_parse_math() for text in (*labels, axis.xaxis.label))
    assert axis.get_xlabel() == "measured class / $"


def test_letters_that_no_font_has_are_said_once(tmp_path: Path) -> None:
    said: list[str] = []
    for number in range(3):
        _draw(tmp_path / f"{number}.png", f"class {DRAWN_BY_NO_FONT}{DRAWN_BY_NO_FONT}", said)
    [line] = said
    assert "U+E0FFF" in line and "install a font" in line
    with Image.open(tmp_path / "2.png") as image:
        assert image.format == "PNG"


def test_letters_come_from_another_font_that_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mathematical letter that DejaVu Sans Mono lacks: the fonts that come with matplotlib have it."""
    letter = next(
        chr(code)
        for code in range(0x2100, 0x2BFF)
        if chr(code) in _letters_of("DejaVu Sans") - _letters_of("STIXGeneral")
    )
    monkeypatch.setitem(canvas._STYLE, "font.family", "STIXGeneral")
    said: list[str] = []
    figure = _draw(tmp_path / "figure.png", f"x {letter}", said)
    families = figure.axes[0]._left_title.get_fontfamily()
    assert families[0] == "STIXGeneral" and len(families) == 2
    assert letter in _letters_of(families[1]) and said == []


def _letters_of(family: str) -> frozenset[str]:
    return canvas._has(canvas.font_manager.findfont(canvas.FontProperties(family=[family])))


def test_the_fewest_families_are_chosen_and_none_that_shows_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    has = {"Last Resort": "abcd", "Serif One": "ab", "Sans Two": "ab", "Three": "abc", "Four": "d"}
    entries = [SimpleNamespace(name=name) for name in has]
    monkeypatch.setattr(canvas.font_manager, "fontManager", SimpleNamespace(ttflist=entries))
    monkeypatch.setattr(canvas.font_manager, "findfont", lambda properties: properties.get_family()[0])
    monkeypatch.setattr(canvas, "_has", lambda name: frozenset(has[name]))
    chosen = canvas._families_with.__wrapped__
    assert chosen("ab", "normal") == (("Sans Two",), "")
    assert chosen("abcd", "normal") == (("Three", "Four"), "")
    assert chosen("az", "normal") == (("Sans Two",), "z")


def test_long_text_ends_in_an_ellipsis() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abcdefg", 6) == "abcde…"
