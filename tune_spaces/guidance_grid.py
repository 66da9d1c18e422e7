"""What more guidance buys and costs: every pair of a small grid, for a figure. Accuracy and KL should both rise with
the strength, and fall with the price of the KL."""

from __future__ import annotations

from typing import Any

from ray import tune

PRESET = "shapes"
METRIC = "accuracy"
MODE = "max"


def space() -> dict[str, Any]:
    """Dotted config path to the values of the grid."""
    return {
        "kl_coef": tune.grid_search([0.5, 1.0, 2.0]),
        "controls.jpeg_size.guidance_strength": tune.grid_search([0.5, 1.0, 2.0, 4.0]),
    }
