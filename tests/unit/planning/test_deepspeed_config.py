"""The DeepSpeed dictionary of a run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ctrl_ray.config import ControlConfig, OptimizerConfig, ScalingConfig, TrainConfig
from ctrl_ray.errors import ConfigError
from ctrl_ray.planning.deepspeed_config import deepspeed_config

CONFIG = TrainConfig(controls={"size": ControlConfig(classes=("a", "b"), oracle="jpeg_size")})


def test_deepspeed_never_scales_or_accumulates_by_itself() -> None:
    """Loss scaling and accumulation would compound along the sweep; clipping defaults to 1.0 when left out."""
    for stage in (0, 1, 2, 3):
        config = dataclasses.replace(CONFIG, scaling=ScalingConfig(zero_stage=stage))  # type: ignore[arg-type]
        values = deepspeed_config(config, 1000)
        assert values["zero_optimization"]["stage"] == stage
        assert not {"fp16", "bf16", "amp"} & values.keys()
        assert values["managed_gradient_accumulation"] is False
        assert values["gradient_accumulation_steps"] == 1
        assert values["gradient_clipping"] == CONFIG.optimizer.gradient_clipping


def test_sharding_and_offload_as_deepspeed_wants_them() -> None:
    """The threshold belongs to ZeRO-3 only, offloading has torch's optimizer, and what cannot be is refused."""

    def zero(**scaling: Any) -> dict[str, Any]:
        return deepspeed_config(dataclasses.replace(CONFIG, scaling=ScalingConfig(**scaling)), 1000)[
            "zero_optimization"
        ]

    assert "stage3_param_persistence_threshold" not in zero(zero_stage=2)
    assert zero(zero_stage=3)["stage3_param_persistence_threshold"] == 100_000
    assert zero(zero_stage=3, zero3_persistence_threshold=0)["stage3_param_persistence_threshold"] == 0
    assert not {"offload_optimizer", "offload_param"} & zero(zero_stage=3).keys()
    optimizer = zero(zero_stage=2, offload="optimizer")
    assert optimizer["offload_optimizer"] == {"device": "cpu", "pin_memory": False} and "offload_param" not in optimizer
    both = zero(zero_stage=3, offload="optimizer_and_parameters", use_gpu=True)
    assert both["offload_optimizer"] == both["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert deepspeed_config(CONFIG, 1000)["zero_force_ds_cpu_optimizer"] is False
    with pytest.raises(ConfigError, match=r"offload is 'optimizer'.*zero_stage 0.*1, 2 or 3"):
        ScalingConfig(zero_stage=0, offload="optimizer")
    with pytest.raises(ConfigError, match=r"'optimizer_and_parameters' needs scaling.zero_stage 3; got 2"):
        ScalingConfig(zero_stage=2, offload="optimizer_and_parameters")
    with pytest.raises(ConfigError, match=r"compile is true with scaling.zero_stage 3"):
        ScalingConfig(zero_stage=3, compile=True)
    with pytest.raises(ConfigError, match=r"SGD has no decoupled weight decay"):
        OptimizerConfig(name="sgd", weight_decay=0.1)


def test_the_bucket_is_no_larger_than_what_there_is_to_reduce() -> None:
    """DeepSpeed allocates it whole: 200 MB for the 3.2 M elements of LoRA otherwise."""
    for trained, bucket in ((3_188_000, 3_188_000), (860_000_000, 50_000_000)):
        assert deepspeed_config(CONFIG, trained)["zero_optimization"]["reduce_bucket_size"] == bucket
