"""Decisions that are values: the DeepSpeed dict, the learning rate, resources, the score, durations."""

from __future__ import annotations

import dataclasses

import pytest

from ctrl_ray.config import (
    ControlConfig,
    OptimizerConfig,
    RewardPoolConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.distributed.cluster import check_resources
from ctrl_ray.distributed.deepspeed_config import deepspeed_config
from ctrl_ray.distributed.engine import learning_rate_factor
from ctrl_ray.distributed.progress import duration
from ctrl_ray.distributed.training import evaluation_score
from ctrl_ray.errors import ModelError, ResourceError, own_error

CONFIG = TrainConfig(controls={"size": ControlConfig(classes=("a", "b"), oracle="jpeg_size")})


def test_deepspeed_never_scales_or_accumulates_by_itself() -> None:
    """Loss scaling and accumulation would compound along the sweep; clipping defaults to 1.0 when left out."""
    for stage in (0, 1, 2, 3):
        config = dataclasses.replace(CONFIG, scaling=ScalingConfig(zero_stage=stage))  # type: ignore[arg-type]
        values = deepspeed_config(config)
        assert values["zero_optimization"]["stage"] == stage
        assert not {"fp16", "bf16", "amp"} & values.keys()
        assert values["managed_gradient_accumulation"] is False
        assert values["gradient_accumulation_steps"] == 1
        assert values["gradient_clipping"] == CONFIG.optimizer.gradient_clipping


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


def test_resource_error_says_both_numbers() -> None:
    """Needed and available, with the sum spelled out."""
    config = dataclasses.replace(
        CONFIG,
        scaling=ScalingConfig(num_workers=2, cpus_per_worker=4),
        rewards=RewardPoolConfig(num_actors=2, cpus_per_actor=1.5),
    )
    check_resources(config, {"CPU": 11.0}, "the cluster")
    with pytest.raises(ResourceError, match=r"needs 11 CPUs \(2 workers × 4 \+ 2 reward actors × 1\.5\).*has 8"):
        check_resources(config, {"CPU": 8.0}, "the cluster")
    gpu = dataclasses.replace(config, scaling=ScalingConfig(num_workers=2, use_gpu=True))
    with pytest.raises(ResourceError, match=r"needs 2 GPUs.*has 1"):
        check_resources(gpu, {"CPU": 64.0, "GPU": 1.0}, "the cluster")


def test_score_is_the_objective_and_refuses_too_much_kl() -> None:
    """What 'best checkpoint' means: γ log p − kl_coef KL, by hand."""
    strong = dataclasses.replace(CONFIG.controls["size"], guidance_strength=4.0)
    config = dataclasses.replace(CONFIG, controls={"size": strong}, kl_coef=0.5)
    assert evaluation_score({"log_prob/size": -0.5, "kl": 3.0}, config) == pytest.approx(4 * -0.5 - 0.5 * 3.0)
    limited = dataclasses.replace(config, target_kl=2.0)
    over, under = {"log_prob/size": -0.1, "kl": 3.0}, {"log_prob/size": -9.0, "kl": 1.0}
    assert evaluation_score(over, limited) < evaluation_score(under, limited)


def test_own_error_is_found_behind_rays() -> None:
    """Through causes and through a worker group's failures."""
    mine = ModelError("what")
    wrapper = RuntimeError("ray")
    wrapper.__cause__ = mine
    group = RuntimeError("group")
    group.worker_failures = {0: wrapper}  # type: ignore[attr-defined]
    assert own_error(group) is mine
    assert own_error(RuntimeError("other")) is None


def test_durations_for_people() -> None:
    """Seconds, minutes, hours."""
    assert [duration(s) for s in (9.6, 65, 7260)] == ["10 s", "1 m 05 s", "2 h 01 m"]
