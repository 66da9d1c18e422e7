"""The planner against what a real worker allocates, and the sweep's memory against the number of steps.

Measured on CPU: the storages alive before an update (found by the garbage collector) plus the peak of what torch's
allocator reported during a whole real update (roll-out, sweep, DeepSpeed's optimizer step) in this process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ctrl_ray.config import ControlConfig, EvaluationConfig, SamplerConfig, ScalingConfig, TrainConfig
from ctrl_ray.distributed import engine
from ctrl_ray.distributed.engine import PolicyEngine
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.distributed.method import make_method
from ctrl_ray.gradients.rollout import keyed_noise, rollout
from ctrl_ray.planning import plan as planner
from ctrl_ray.planning.counts import PolicyCounter
from ctrl_ray.planning.deepspeed_config import deepspeed_config
from ctrl_ray.planning.live_bytes import LiveBytes
from ctrl_ray.planning.plan import MemoryPlan, memory_plan
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.rewards.protocol import RewardAnswer
from tests.gradients import full_pass
from tests.memory import allocated_peak, live_storages

pytestmark = pytest.mark.full

CONTROLS = {"size": ControlConfig(classes=("a", "b", "c"))}
PROMPTS = ("a red circle", "a blue square")


@dataclass(frozen=True)
class _Answer:
    rewarded: RewardAnswer

    def result(self, timeout_s: float | None = None) -> RewardAnswer:
        return self.rewarded


class StandardNormal:
    """log p = −‖x‖²/2 for every control: a reward whose gradient is known, and which takes no memory of the worker's."""

    differentiable = True

    def submit(self, latents: Tensor, prompts: Sequence[str], labels: Tensor, weights: Tensor) -> _Answer:
        log_prob = -latents.flatten(1).square().sum(1, keepdim=True) / 2
        scale = weights.sum(1).view(-1, *[1] * (latents.dim() - 1)).to(latents.device)
        return _Answer(RewardAnswer(log_prob.expand(len(latents), labels.shape[1]).clone(), -latents * scale))


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """A process group of this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # DeepSpeed wants it; Ray Train sets it for a worker
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def _config(base_model: str, micro_batch: int, **changes: object) -> TrainConfig:
    config = TrainConfig(
        base_model=base_model,
        controls=CONTROLS,
        sampler=SamplerConfig(num_steps=4),
        global_batch_size=2 * micro_batch,
        micro_batch_size_per_worker=micro_batch,
        evaluation=EvaluationConfig(batch_size=1),  # what an update takes is measured
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def _planned(config: TrainConfig) -> MemoryPlan:
    counter = PolicyCounter(config, CONTROLS)
    step = counter.step(config.fixed_micro_batch_size)
    return memory_plan(config, counter.counts(), step, counter.evaluation(config.evaluation.fixed_batch_size))


def _measured(config: TrainConfig) -> int:
    """Peak tensor bytes of a worker during its second update."""
    before = live_storages().keys()
    backbone = load_backbone(config.base_model)
    learner = Learner(
        config=config,
        engine=PolicyEngine(build_policy(config, CONTROLS), config),
        kernel=backbone.make_kernel(config.sampler),
        encoder=backbone.load_encoder().only(PROMPTS),
        rewards=StandardNormal(),  # type: ignore[arg-type]
        controls=CONTROLS,
        prompts=PROMPTS,
        rank=Rank(0, 1, torch.device("cpu")),
    )
    make_method(learner.config).update(learner, 0)
    resident = sum(size for key, size in live_storages().items() if key not in before)
    return resident + allocated_peak(lambda: make_method(learner.config).update(learner, 1))


@pytest.fixture
def small_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's reduction bucket at 20 000 elements: with its default of 2 GB it would hide all else."""

    def with_small_bucket(config: TrainConfig, trained_elements: int) -> dict[str, Any]:
        values = deepspeed_config(config, trained_elements)
        return values | {"zero_optimization": values["zero_optimization"] | {"reduce_bucket_size": 20_000}}

    monkeypatch.setattr(planner, "deepspeed_config", with_small_bucket)
    monkeypatch.setattr(engine, "deepspeed_config", with_small_bucket)


@pytest.mark.parametrize(("stage", "micro_batch"), [(0, 4), (1, 4), (1, 16), (2, 4)])
def test_planned_bytes_are_measured_bytes(
    one_rank: None, small_bucket: None, tiny_pipeline: Path, stage: int, micro_batch: int
) -> None:
    """Within 15 % at two micro-batch sizes, and under several ZeRO stages."""
    config = _config(str(tiny_pipeline), micro_batch, scaling=ScalingConfig(zero_stage=stage))  # type: ignore[arg-type]
    planned, measured = _planned(config).peak, _measured(config)
    assert abs(planned / measured - 1) < 0.15, (planned, measured)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shapes_is_planned_as_measured(one_rank: None, checkpointing: bool) -> None:
    """The shipped pipeline (another UNet, 16 times the weights), with and without gradient checkpointing, and guided."""
    config = _config(
        "shapes",
        8,
        sampler=SamplerConfig(num_steps=2, guidance_scale=2.0),
        scaling=ScalingConfig(zero_stage=0, gradient_checkpointing=checkpointing),
    )
    planned, measured = _planned(config).peak, _measured(config)
    assert abs(planned / measured - 1) < 0.15, (planned, measured)


def _adjoint_peak(num_steps: int, batch_size: int = 4) -> tuple[int, int]:
    """(peak bytes of weights and one adjoint pass of the shipped pipeline, of them the kept latents)."""
    config = _config("shapes", batch_size, sampler=SamplerConfig(num_steps=num_steps))
    with LiveBytes() as live:
        policy = build_policy(config, CONTROLS)
        for parameter in policy.parameters():
            live.add(parameter)
        kernel = policy.backbone.make_kernel(SamplerConfig(num_steps=num_steps))
        condition = policy.backbone.load_encoder().encode(["a red circle"] * batch_size)
        noise = keyed_noise(0, 0, range(batch_size), policy.latent_shape, num_steps)
        labels = torch.zeros(batch_size, 1, dtype=torch.long)
        trajectory = rollout(policy, kernel, Inputs(condition, labels), noise)
        del noise
        live.restart_peak()
        full_pass(policy, kernel, trajectory, -trajectory.clean_latents, torch.full((batch_size,), 1 / batch_size))
    return live.peak, trajectory.latents.untyped_storage().nbytes()


def test_an_adjoint_pass_of_50_steps_takes_the_memory_of_10() -> None:
    """At most 1.05 × in all; without the kept latents, the only part that grows with the steps, at most 1.001 ×."""
    (peak_10, latents_10), (peak_50, latents_50) = _adjoint_peak(10), _adjoint_peak(50)
    assert latents_50 == 51 * latents_10 // 11
    assert peak_50 <= 1.05 * peak_10
    assert peak_50 - latents_50 <= 1.001 * (peak_10 - latents_10)
