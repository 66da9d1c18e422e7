"""Accuracy against KL, both as goals: Optuna looks for trials that no other one beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray import tune
from ray.tune.search.optuna import OptunaSearch

PRESET = "shapes"
METRIC = ("accuracy", "kl")
MODE = ("max", "min")


def space() -> dict[str, Any]:
    """Dotted config path to distribution."""
    return {
        "kl_coef": tune.loguniform(0.5, 2.0),
        "controls.jpeg_size.guidance_strength": tune.loguniform(0.6, 5.0),
        "optimizer.learning_rate": tune.loguniform(3e-3, 2e-2),
    }


def search(metric: Sequence[str], mode: Sequence[str], points: Sequence[dict[str, Any]]) -> OptunaSearch:
    """Optuna's default for several goals (NSGA-II), seeded."""
    return OptunaSearch(metric=list(metric), mode=list(mode), points_to_evaluate=list(points) or None, seed=0)
