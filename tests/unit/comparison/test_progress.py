"""Lines about how far a comparison is."""

from __future__ import annotations

import pytest

from ctrl_ray.comparison.progress import Progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_time_left_is_by_the_pace_of_what_was_drawn(clock: Clock) -> None:
    """100 units in 20 s, 300 to go: what was found on disk before has no pace."""
    lines: list[str] = []
    progress = Progress(800.0, lines.append, clock)
    progress.what = "DPS, test"
    progress.drawn(400.0, None)
    assert progress.left == ""
    clock.now = 20.0
    progress.drawn(100.0, 20.0)
    assert lines == ["DPS, test: 62% of all images · 1 m 00 s left to draw"]


def test_lines_come_every_ten_seconds_at_most(clock: Clock) -> None:
    lines: list[str] = []
    progress = Progress(100.0, lines.append, clock)
    for second in range(25):
        clock.now = float(second)
        progress.drawn(1.0, 1.0)
    assert len(lines) == 2


def test_values_that_are_not_drawn_are_done(clock: Clock) -> None:
    """A method's test at a cheap value takes less than was planned; never backwards, never above all."""
    progress = Progress(100.0, lambda line: None, clock)
    progress.drawn(10.0, 5.0)
    progress.reached(60.0)
    progress.reached(20.0)
    assert progress.share == 0.6 and progress.left == " · 20 s left to draw"
    progress.drawn(70.0, 5.0)
    assert progress.share == 1.0
