"""The distance to the target: what is drawn of it, and what is said of its structural part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from ctrl_ray.config import SamplerConfig
from ctrl_ray.reporting.distance import distance_rows, distance_section, plot_distance, structural_losses
from tests.pictures import dots, recorded, texts


def _numbers(
    objective: float, gap: float, *, low: float, high: float | None = None, wide: bool = False
) -> dict[str, Any]:
    return {
        **{"objective": objective, "log_z": objective + gap, "gap": gap, "gap_standard_error": 0.25, "ess": 0.5},
        **{"pareto_k": 0.1, "bounds": [low, high], "too_wide": wide},
    }


AFTER = {
    "accuracy": 0.5,
    **_numbers(-4.0, 2.0, low=-3.0),
    "certificate/size/<1": _numbers(-5.0, 3.0, low=-2.5, high=-1.5),
    "certificate/size/>=1": _numbers(-3.0, -0.5, low=-3.25, wide=True),
    "certificate/colour/pale": _numbers(-4.5, 1.0, low=-3.75, high=-3.25),
}
ALL, SMALL, LARGE, PALE = 0, 2, 3, 5
"""Heights of the rows, from the top: 1 and 4 name the controls."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Figure:
    with recorded() as figures:
        assert plot_distance(tmp_path_factory.mktemp("drawn") / "distance.png", distance_rows(AFTER)) is not None
    return figures["distance.png"]


def test_the_gap_is_the_line_from_the_objective_to_log_z(drawn: Figure) -> None:
    levels = drawn.axes[0]
    np.testing.assert_allclose(dots(levels, 0), [[-4, ALL], [-5, SMALL], [-3, LARGE], [-4.5, PALE]])
    np.testing.assert_allclose(dots(levels, 1), [[-2, ALL], [-2, SMALL], [-3.5, LARGE], [-3.5, PALE]])
    [lines] = [
        found for found in levels.collections if hasattr(found, "get_segments") and not hasattr(found, "get_sizes")
    ]
    np.testing.assert_allclose(lines.get_segments()[1], [[-5, SMALL], [-2, SMALL]])


def test_bounds_on_log_z_are_beneath_it(drawn: Figure) -> None:
    """The lower ones of all four, the upper ones where they are known."""
    levels = drawn.axes[0]
    np.testing.assert_allclose(dots(levels, 2)[:, 0], [-3, -2.5, -3.25, -3.75])
    np.testing.assert_allclose(dots(levels, 3), [[-1.5, SMALL + 0.3], [-3.25, PALE + 0.3]])
    np.testing.assert_allclose(levels.lines[0].get_xdata(), [-2.5, -1.5])


def test_bars_are_the_gaps_with_two_standard_errors(drawn: Figure) -> None:
    gaps = drawn.axes[1]
    assert [bar.get_width() for bar in gaps.patches] == [2.0, 3.0, -0.5, 1.0]
    [errors] = gaps.collections
    np.testing.assert_allclose(errors.get_segments()[0], [[1.5, ALL], [2.5, ALL]])
    assert texts(gaps) == ["2.00 ± 0.25", "3.00 ± 0.25", "-0.50 ± 0.25", "1.00 ± 0.25"]
    white = (1.0, 1.0, 1.0, 1.0)
    assert [bar.get_facecolor() == white for bar in gaps.patches] == [False, False, True, False]  # what is too wide
    assert gaps.get_xlim()[0] == pytest.approx(-1.0)


def test_rows_are_grouped_by_control(drawn: Figure) -> None:
    names = [label.get_text() for label in drawn.axes[0].get_yticklabels()]
    assert names == ["all", "size", "<1", ">=1", "colour", "pale"]
    assert [label.get_fontweight() == "bold" for label in drawn.axes[0].get_yticklabels()] == [
        False,
        True,
        False,
        False,
        True,
        False,
    ]


@pytest.mark.full
def test_sixteen_classes_have_room(tmp_path: Path, figures: dict[str, Figure]) -> None:
    rows = distance_rows({f"certificate/hue/{i}": _numbers(-3.0, 1.0, low=-2.0) for i in range(16)})
    plot_distance(tmp_path / "many.png", rows)
    drawn = figures["many.png"]
    boxes = sorted((label.get_window_extent() for label in drawn.axes[0].get_yticklabels()), key=lambda box: box.y0)
    assert len(boxes) == 17 and all(low.y1 <= high.y0 for low, high in zip(boxes, boxes[1:]))


def test_without_a_certificate_nothing_is_drawn_or_said(tmp_path: Path) -> None:
    assert distance_rows({"accuracy": 0.5, "gap": None}) == []
    assert plot_distance(tmp_path / "none.png", []) is None and not (tmp_path / "none.png").exists()
    assert distance_section({"accuracy": 0.5}, SamplerConfig()) == ""


def test_structural_losses_are_those_of_the_sampler() -> None:
    variances, start = structural_losses(SamplerConfig(num_steps=50, eta=1.0), {})
    assert "more steps than 50" in variances and "hardly at all at eta 1" in start
    _, start, last = structural_losses(SamplerConfig(num_steps=50, eta=0.5, reference_steps=2), {})
    assert "since eta is 0.5" in start and last.startswith(
        "the last 2 denoising steps: the pre-trained model takes them"
    )
    page = distance_section(AFTER, SamplerConfig(reference_steps=1))
    assert page.count("<li>") == 3 and "the last denoising step: the pre-trained model takes it" in page
    assert "<li>" not in distance_section(AFTER, None)
    parts = {
        "initial_noise": {"value": -0.02, "standard_error": 0.04},
        "reference_steps": {"value": 1.5, "standard_error": 0.25},
    }
    page = distance_section({**AFTER, "structural": parts}, SamplerConfig(reference_steps=1))
    assert (
        "the initial noise, less than 0.08 nats (two standard errors): " in page
        and "the last denoising step, 1.50 ± 0.25 nats: " in page
        and "Together" not in page
    )
    small = {"reference_steps": {"value": 0.0045, "standard_error": 0.0013}}
    assert ", 0.0045 ± 0.0013 nats: " in structural_losses(SamplerConfig(reference_steps=1), small)[2]
    parts["fixed_variances"] = {"value": 1.0, "standard_error": 0.1}
    page = distance_section({**AFTER, "gap": 3.0, "structural": parts}, SamplerConfig(reference_steps=1))
    assert "fixed step variances, 1.00 ± 0.10 nats: " in page
    assert "Together 2.48 ± 0.27 of the 3.00 nats" in page and "the other 0.52 nats" in page
