"""The engine's learning rate."""

from __future__ import annotations

import dataclasses

import pytest

from ctrl_ray.config import ControlConfig, OptimizerConfig, TrainConfig
from ctrl_ray.distributed.engine import learning_rate_factor

CONFIG = TrainConfig(controls={"size": ControlConfig(classes=("a", "b"), oracle="jpeg_size")})


def test_learning_rate_warms_up_and_decays() -> None:
    """Linear to 1, cosine to the floor."""
    config = dataclasses.replace(
        CONFIG, num_updates=12, optimizer=OptimizerConfig(warmup_updates=2, final_learning_rate_fraction=0.1)
    )
    factors = [learning_rate_factor(config, update) for update in range(12)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert factors[7] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way through the cosine: update 2 + 5 of 10
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert learning_rate_factor(config, 12) == pytest.approx(0.1)
