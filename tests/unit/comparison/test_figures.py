"""What the pictures show: each method at its cost and value, labels that cover nothing, the same noise in each column."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from ctrl_ray.comparison.figures import plot_accuracy, plot_distance_to_target, plot_grid
from ctrl_ray.config import ControlConfig
from ctrl_ray.evaluation.samples import EvaluationSamples
from tests.pictures import dots, texts
from tests.unit.comparison.rows import row

METHODS = [
    row("plain", accuracy=0.25, worst=20.0),
    row("ctrl", ratio=1.05, accuracy=0.9, worst=2.5),
    row("dps", ratio=8.0, accuracy=0.6, worst=9.0),
]


def test_a_method_is_a_dot_at_its_cost_and_accuracy(tmp_path: Path, figures: dict[str, Figure]) -> None:
    assert plot_accuracy(tmp_path / "accuracy.png", METHODS) == tmp_path / "accuracy.png"
    (axis,) = figures["accuracy.png"].axes
    assert dots(axis).tolist() == [[1.0, 0.25], [1.05, 0.9], [8.0, 0.6]]
    assert texts(axis) == ["pre-trained", "CTRL", "dps"]
    assert axis.get_xscale() == "log" and axis.get_yscale() == "linear"


def test_an_interval_is_drawn_around_the_accuracy(tmp_path: Path, figures: dict[str, Figure]) -> None:
    """1.96 standard errors of 0.01 to each side."""
    plot_accuracy(tmp_path / "accuracy.png", METHODS[1:2])
    (axis,) = figures["accuracy.png"].axes
    (bar,) = [c for c in axis.collections if not hasattr(c, "get_sizes") or not len(c.get_offsets())][:1]
    (segment,) = bar.get_segments()
    assert segment[:, 1].tolist() == pytest.approx([0.9 - 0.0196, 0.9 + 0.0196])


def test_distances_have_log_axes_and_the_floor_is_a_line(tmp_path: Path, figures: dict[str, Figure]) -> None:
    unknown = row("tds", ratio=30.0, worst=None)
    assert plot_distance_to_target(tmp_path / "distance.png", [*METHODS, unknown]) is not None
    (axis,) = figures["distance.png"].axes
    assert dots(axis).tolist() == [[1.0, 20.0], [1.05, 2.5], [8.0, 9.0]]
    assert axis.get_xscale() == axis.get_yscale() == "log"
    assert [list(line.get_ydata()) for line in axis.lines if line.get_linestyle() == "--"] == [[1.0, 1.0]]
    assert "tds" not in texts(axis)


def test_what_is_not_known_is_no_picture(tmp_path: Path) -> None:
    assert plot_accuracy(tmp_path / "a.png", [row("ctrl", accuracy=None)]) is None
    assert plot_distance_to_target(tmp_path / "d.png", [row("ctrl", worst=None)]) is None
    assert not list(tmp_path.iterdir())


def test_labels_cover_neither_each_other_nor_a_dot(tmp_path: Path, figures: dict[str, Figure]) -> None:
    """Nine methods in one corner, and all inside the axes."""
    crowd = [row(f"method {i}", ratio=1.0 + 0.01 * i, accuracy=0.80 + 0.004 * (i % 3)) for i in range(9)]
    plot_accuracy(tmp_path / "accuracy.png", [*crowd, row("far", ratio=90.0, accuracy=0.3)])
    (axis,) = figures["accuracy.png"].axes
    notes = [text for text in axis.texts if isinstance(text, Annotation)]
    assert len(notes) == 10
    figures["accuracy.png"].canvas.draw()  # what was saved had other pixels
    boxes = [Text.get_window_extent(note) for note in notes]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
    centres = axis.transData.transform(dots(axis))
    assert not any(box.contains(*centre) for box in boxes for centre in centres)
    frame = axis.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 for box in boxes)


def test_labels_leave_bars_and_the_floor_free(tmp_path: Path, figures: dict[str, Figure]) -> None:
    """A bar of a neighbour at the right, where a label would be first; and the line at 1."""
    left = row("left", ratio=1.0, accuracy=0.8, worst=1.0)
    plot_accuracy(tmp_path / "accuracy.png", [left, row("right", ratio=1.15, accuracy=0.9, errors={"accuracy": 0.09})])
    plot_distance_to_target(tmp_path / "distance.png", [left, row("right", ratio=9.0, worst=3.0)])
    for name, x, low, high in (("accuracy.png", 1.15, 0.72, 1.0), ("distance.png", None, 1.0, 1.0)):
        (axis,) = figures[name].axes
        figures[name].canvas.draw()
        note = next(text for text in axis.texts if text.get_text() == "left")
        box = Text.get_window_extent(note)
        (at, bottom), (_, top) = axis.transData.transform([(x or 1.0, low), (x or 1.0, high)])
        across = x is None or box.x0 < at < box.x1
        assert not (across and box.y0 < top + 0.5 and box.y1 > bottom - 0.5)


def samples(value: int) -> EvaluationSamples:
    """Two of each class, one grey each."""
    return EvaluationSamples(
        images=np.full((4, 8, 8, 3), value, np.uint8),
        prompts=("a red circle", "a blue square") * 2,
        labels=np.array([[0], [1], [0], [1]]),
        kl=np.zeros(4),
        sample_ids=np.arange(4),
    )


def test_the_grid_has_a_line_for_each_method_and_a_column_for_each_noise(
    tmp_path: Path, figures: dict[str, Figure], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class by class; a caption says what was measured and whether it is the class asked for."""
    # a blue square counts 10 less
    monkeypatch.setattr(
        "ctrl_ray.evaluation.judging.load_oracle",
        lambda name: lambda image, prompt: image.getpixel((0, 0))[0] - 10 * ("blue" in prompt),
    )
    control = ControlConfig(oracle="grey", thresholds=(100.0,), classes=("dark", "light"), unit="levels")
    drawn = {"pre-trained": samples(50), "a method of a name that is too long": samples(150)}
    plot_grid(tmp_path / "samples.png", drawn, "grey", control, 0)
    (axis,) = figures["samples.png"].axes
    words = texts(axis)
    assert words[0] == "grey / levels: the same prompt, class and noise in each column"
    assert words[1] == "pre-trained" and words[10] == "a method of a name that…"
    assert words[2:10:2] == ["50 ✓", "50 ✓", "40 ✗", "40 ✗"] and words[11:19:2] == ["150 ✗", "150 ✗", "140 ✓", "140 ✓"]
    assert words[3:10:2] == ["red circle dark", "red circle dark", "blue square light", "blue square light"]
