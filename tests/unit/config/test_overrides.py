"""Settings changed by their paths."""

from __future__ import annotations

import numpy as np
import pytest

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.config.overrides import override
from ctrl_ray.errors import ConfigError


def test_override_replaces_what_belongs_together() -> None:
    base = TrainConfig(controls={"jpeg_size": ControlConfig(thresholds=(1.0, 2.0))})
    changed = override(
        base,
        {
            "controls.jpeg_size.guidance_strength": np.float64(3),
            "group_size": 5,  # neither would divide the batch sizes that were
            "global_batch_size": 100,
            "micro_batch_size_per_worker": 50,
            "lora.target_modules": ["to_q"],
        },
    )
    assert changed.controls["jpeg_size"].guidance_strength == 3.0
    assert (changed.group_size, changed.global_batch_size, changed.micro_batch_size_per_worker) == (5, 100, 50)
    assert changed.lora.target_modules == ("to_q",)
    for path, value in (("seed", True), ("tracker", 1), ("estimator.name", "ful"), ("prompts_file", 3)):
        with pytest.raises(ConfigError, match=f"{path} is .*; expected"):
            override(base, {path: value})
