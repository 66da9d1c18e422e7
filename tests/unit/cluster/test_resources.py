"""What a run needs and what the cluster has."""

from __future__ import annotations

import dataclasses

import pytest

from ctrl_ray.cluster.resources import check_resources
from ctrl_ray.config import ControlConfig, RewardPoolConfig, ScalingConfig, TrainConfig
from ctrl_ray.errors import ResourceError

CONFIG = TrainConfig(controls={"size": ControlConfig(classes=("a", "b"), oracle="jpeg_size")})


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
