"""Decisions that are values: the DeepSpeed dict, the learning rate, resources, durations."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ctrl_ray.cluster.resources import check_resources
from ctrl_ray.config import (
    ControlConfig,
    OptimizerConfig,
    RewardPoolConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.distributed.checkpoints import assign_owners, read_checkpoint
from ctrl_ray.distributed.engine import learning_rate_factor
from ctrl_ray.distributed.worker_group import num_workers
from ctrl_ray.errors import ConfigError, ModelError, ResourceError, own_error
from ctrl_ray.planning.deepspeed_config import deepspeed_config
from ctrl_ray.policy.adapter import shard_file
from ctrl_ray.wording import duration

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


def test_sharding_and_offload_as_deepspeed_wants_them() -> None:
    """The threshold belongs to ZeRO-3 only, offloading has torch's optimizer, and what cannot be is refused."""

    def zero(**scaling: Any) -> dict[str, Any]:
        return deepspeed_config(dataclasses.replace(CONFIG, scaling=ScalingConfig(**scaling)))["zero_optimization"]

    assert "stage3_param_persistence_threshold" not in zero(zero_stage=2)
    assert zero(zero_stage=3)["stage3_param_persistence_threshold"] == 100_000
    assert zero(zero_stage=3, zero3_persistence_threshold=0)["stage3_param_persistence_threshold"] == 0
    assert not {"offload_optimizer", "offload_param"} & zero(zero_stage=3).keys()
    optimizer = zero(zero_stage=2, offload="optimizer")
    assert optimizer["offload_optimizer"] == {"device": "cpu", "pin_memory": False} and "offload_param" not in optimizer
    both = zero(zero_stage=3, offload="optimizer_and_parameters", use_gpu=True)
    assert both["offload_optimizer"] == both["offload_param"] == {"device": "cpu", "pin_memory": True}
    assert deepspeed_config(CONFIG)["zero_force_ds_cpu_optimizer"] is False
    with pytest.raises(ConfigError, match=r"offload is 'optimizer'.*zero_stage 0.*1, 2 or 3"):
        ScalingConfig(zero_stage=0, offload="optimizer")
    with pytest.raises(ConfigError, match=r"'optimizer_and_parameters' needs scaling.zero_stage 3; got 2"):
        ScalingConfig(zero_stage=2, offload="optimizer_and_parameters")
    with pytest.raises(ConfigError, match=r"SGD has no decoupled weight decay"):
        OptimizerConfig(name="sgd", weight_decay=0.1)


def test_an_elastic_group_is_a_range() -> None:
    """Ray Train's tuple; the fewest workers must fit the cluster, the most need not."""
    assert num_workers(ScalingConfig(num_workers=3)) == 3
    assert num_workers(ScalingConfig(num_workers=3, min_workers=3)) == 3
    assert num_workers(ScalingConfig(num_workers=3, min_workers=1)) == (1, 3)
    for wrong in (0, 4):
        with pytest.raises(ConfigError, match=rf"min_workers is {wrong}; expected 1 to scaling.num_workers \(3\)"):
            ScalingConfig(num_workers=3, min_workers=wrong)
    config = dataclasses.replace(
        CONFIG,
        scaling=ScalingConfig(num_workers=8, min_workers=2),
        global_batch_size=64,
        micro_batch_size_per_worker=8,
        rewards=RewardPoolConfig(num_actors=1),
    )
    check_resources(config, {"CPU": 3.0}, "the cluster")
    with pytest.raises(ResourceError, match="needs 3 CPUs"):
        check_resources(config, {"CPU": 2.0}, "the cluster")


def test_every_parameter_of_a_checkpoint_has_one_owner_and_ranks_carry_alike() -> None:
    """By hand: 9 | 7, 3 against 9, 2 with the embedding at rank 0; no rank carries more than the mean and the largest."""
    sizes = {"a": 7, "b": 9, "controls.x": 2, "c": 3}
    assert assign_owners(sizes, 2) == {"b": 0, "a": 1, "c": 1, "controls.x": 0}
    assert assign_owners(sizes, 1) == dict.fromkeys(sizes, 0)
    sizes = {f"p{i}": (i * 7919) % 1000 + 1 for i in range(200)}
    owners = assign_owners(sizes, 7)
    loads = [sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(7)]
    assert owners.keys() == sizes.keys() and max(loads) <= sum(sizes.values()) / 7 + max(sizes.values())


def test_a_checkpoint_in_parts_is_read_as_one_and_a_missing_part_is_named(tmp_path: Path) -> None:
    """Tensors come from whichever file has them."""
    (tmp_path / "progress.json").write_text('{"updates_done": 4}')
    parts = [{"a": torch.arange(3.0), "step": torch.tensor(4.0)}, {"b": torch.ones(2, 2), "step": torch.tensor(4.0)}]
    files = [tmp_path / shard_file("training_state", rank, 2) for rank in range(2)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, file)
    state, progress = read_checkpoint(tmp_path)
    assert progress == {"updates_done": 4} and set(state) == {"a", "b", "step"} and len(state) == 3
    assert torch.equal(state["a"], parts[0]["a"]) and torch.equal(state["b"], parts[1]["b"])
    files[0].write_bytes(files[0].read_bytes()[:-4])  # torn
    with pytest.raises(ModelError, match=r"training_state-00001-of-00002.*cannot be read"):
        read_checkpoint(tmp_path)
    files[0].unlink()
    with pytest.raises(ModelError, match=r"holds the state files .*expected .*00001-of-00002.*not written completely"):
        read_checkpoint(tmp_path)


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
