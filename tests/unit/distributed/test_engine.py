"""The engine's learning rate, and what DeepSpeed is told of its parameters."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ctrl_ray.config import ControlConfig, OptimizerConfig, TrainConfig
from ctrl_ray.distributed import engine
from ctrl_ray.distributed.engine import PolicyEngine, learning_rate_factor

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


def test_deepspeed_is_told_how_much_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bucket is no larger than that."""
    told: list[int] = []

    def initialize(*, config: dict[str, Any], **_: Any) -> Any:
        told.append(config["zero_optimization"]["reduce_bucket_size"])
        raise InterruptedError

    monkeypatch.setattr(engine.deepspeed, "initialize", initialize)
    trained = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in (("a", (3, 4)), ("b", (5,)))}
    policy: Any = SimpleNamespace(
        latent_shape=(4,),
        parameter_groups=lambda *rates: [{"params": list(trained.values()), "lr": rates[0]}],
        trainable_parameters=lambda: trained,
    )
    with pytest.raises(InterruptedError):
        PolicyEngine(policy, CONFIG)
    assert told == [3 * 4 + 5]
