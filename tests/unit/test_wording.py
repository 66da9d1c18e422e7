"""Numbers in words."""

from __future__ import annotations

from ctrl_ray.wording import accuracy_text, duration, kl_text


def test_durations_for_people() -> None:
    """Seconds, minutes, hours."""
    assert [duration(s) for s in (9.6, 65, 7260)] == ["10 s", "1 m 05 s", "2 h 01 m"]


def test_a_kl_and_what_cannot_be_told_from_rounding() -> None:
    """Two digits of the floor, whatever its size."""
    floors = [None, 0.000503, 0.00617, 0.227, 1.04, 143.7]
    texts = ["", " (floor 0.0005)", " (floor 0.0062)", " (floor 0.23)", " (floor 1)", " (floor 144)"]
    assert [kl_text(2.0, floor) for floor in floors] == [f"KL 2.00 nats{text}" for text in texts]


def test_several_controls_stand_beside_their_mean() -> None:
    assert accuracy_text({"accuracy": 0.5, "accuracy/size": 0.5, "kl": 1.0}) == "accuracy 0.500"
    both = {"accuracy": 0.6875, "accuracy/size": 0.875, "accuracy/colour": 0.5}
    assert accuracy_text(both) == "accuracy of size 0.875, of colour 0.500 (mean 0.688)"
    assert accuracy_text({"kl": 1.0}) == ""
