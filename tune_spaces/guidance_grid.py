"""What more guidance buys and costs: one run for each strength, all else fixed. Accuracy and KL should both rise."""

from __future__ import annotations

from typing import Any

from ray import tune

PRESET = "shapes"
METRIC = "accuracy"
MODE = "max"


def space() -> dict[str, Any]:
    """Dotted config path to the values of the grid."""
    return {"controls.jpeg_size.guidance_strength": tune.grid_search([0.5, 1.0, 2.0, 4.0])}
