"""Numbers in words."""

from __future__ import annotations

from ctrl_ray.wording import duration


def test_durations_for_people() -> None:
    """Seconds, minutes, hours."""
    assert [duration(s) for s in (9.6, 65, 7260)] == ["10 s", "1 m 05 s", "2 h 01 m"]
