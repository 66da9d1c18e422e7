"""How many labels another method needs, on curves whose crossing is known."""

from __future__ import annotations

import pytest

from ctrl_ray.comparison.budgets.needed import Needed, images_needed, label_ratios

BUDGETS = (64, 256, 1024, 4096)


def test_a_power_law_crosses_where_its_formula_says() -> None:
    """d = 160 / √n passes 7 at n = (160 / 7)²."""
    found = images_needed(7.0, BUDGETS, [160 / budget**0.5 for budget in BUDGETS])
    assert (found.images, found.bound) == (pytest.approx((160 / 7) ** 2), "=")


def test_a_budget_itself_is_where_its_distance_is_asked_for() -> None:
    assert images_needed(5.0, BUDGETS, [20.0, 10.0, 5.0, 2.5]).images == pytest.approx(1024)


@pytest.mark.parametrize(
    ("distance", "needed"),
    [(30.0, Needed(64, "<=")), (20.0, Needed(64, "<=")), (2.0, Needed(4096, ">"))],
)
def test_beyond_the_budgets_there_are_bounds(distance: float, needed: Needed) -> None:
    assert images_needed(distance, BUDGETS, [20.0, 10.0, 5.0, 2.5]) == needed


def test_a_curve_that_rises_again_counts_as_what_it_had_reached() -> None:
    """The first crossing is the answer, and noise after it changes nothing."""
    assert images_needed(10.0, BUDGETS, [20.0, 10.0, 15.0, 2.5]).images == pytest.approx(256)
    assert images_needed(8.0, BUDGETS, [20.0, 10.0, 15.0, 2.5]).images == pytest.approx(
        images_needed(8.0, BUDGETS, [20.0, 10.0, 10.0, 2.5]).images
    )


def test_ratios_pair_the_seeds_and_keep_their_extremes() -> None:
    """Seed by seed; a curve that does not come so near gives the largest budget as a bound."""
    ours = [[2.5, 5.0, 10.0], [1.0, 1.0, 1.0]]
    theirs = [[10.0, 20.0, 40.0], [2.5, 10.0, 40.0]]
    first, last = label_ratios((64, 256), ours, theirs)
    assert (first["budget"], first["ratio"], first["bounds"]) == (64, 4.0, ["=", ">", ">"])
    assert (first["low"], first["high"]) == (pytest.approx(4.0), 4.0)
    assert last == {"budget": 256, "ratio": 1.0, "low": 1.0, "high": 1.0, "bounds": [">", ">", ">"]}
    ours, theirs = [[4.0, 8.0, 2.0]] * 3, [[16.0, 16.0, 2.0], [4.0, 8.0, 1.0], [1.0, 2.0, 0.5]]
    (middle,) = [found for found in label_ratios((16, 64, 256), ours, theirs) if found["budget"] == 16]
    assert (middle["ratio"], middle["low"], middle["high"]) == (pytest.approx(4.0), 1.0, pytest.approx(4.0))
    assert middle["bounds"] == ["=", "=", "<="]
