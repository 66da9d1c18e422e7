"""Pictures as tests read them: by what was drawn (heights, places, texts), not by how many pixels it took."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, Figure]]:
    """Every figure that is saved meanwhile, by the name of its file."""
    saved: dict[str, Figure] = {}
    own = Figure.savefig

    def savefig(self: Figure, path: str | Path, **options: Any) -> None:
        saved[Path(path).name] = self
        own(self, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield saved


def heights(axis: Axes) -> list[float]:
    """Of the bars."""
    return [float(bar.get_height()) for bar in axis.patches]


def line(axis: Axes, label: str) -> np.ndarray:
    """(N, 2) of the line with this label in the legend."""
    (found,) = [line for line in axis.lines if line.get_label() == label]
    return np.asarray(found.get_xydata())


def dots(axis: Axes, index: int = 0) -> np.ndarray:
    """(N, 2) of the scatter that was drawn `index`-th; empty ones, which only name something, are left out."""
    offsets = [np.asarray(found.get_offsets()) for found in axis.collections if hasattr(found, "get_sizes")]
    return [each for each in offsets if len(each)][index]


def texts(axis: Axes) -> list[str]:
    """Everything written inside."""
    return [text.get_text() for text in axis.texts]
