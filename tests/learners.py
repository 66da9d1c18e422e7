"""Learners on one device, in this process: a small run's settings, and what stands in for DeepSpeed's engine and a pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrl_ray.config import ControlConfig, EvaluationConfig, LoraConfig, SamplerConfig, TrainConfig
from ctrl_ray.diffusion.steps import ModelOutput
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.distributed.worker import TrainJob, load_prompts, make_learner
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.rewards.model import RewardModel, RewardModelSpec, load_reward_model
from ctrl_ray.rewards.protocol import RewardAnswer
from tests.classifiers import save_classifier

PROMPTS = ("a red circle", "a blue square")


class SGDEngine:
    """SGD around a policy, in the place of DeepSpeed's engine, which builds for one kind of device in a process."""

    learning_rate = 0.1

    def __init__(self, policy: ControlledPolicy) -> None:
        self.policy, self.latent_shape = policy, policy.latent_shape

    def __call__(self, latents: Tensor, time: Tensor, inputs: Inputs, *, reference: bool) -> ModelOutput:
        return self.policy(latents, time, inputs, reference=reference)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, update: int) -> float:
        for parameter in self.policy.trainable_parameters().values():
            assert parameter.grad is not None
            parameter.data.add_(parameter.grad, alpha=-self.learning_rate)
            parameter.grad = None
        return 0.0


class CPUPool:
    """What a pool on the CPU is to a worker: answers come back on the latents' device, everything else on the CPU."""

    differentiable = True

    def __init__(self, model: RewardModel) -> None:
        self.model, self.controls = model, model.controls

    def submit(self, latents: Tensor, prompts: Sequence[str], labels: Tensor, weights: Tensor) -> CPUPool:
        answer = self.model.evaluate(latents.cpu(), prompts, labels, weights)
        assert answer.cotangent is not None
        self.answer = RewardAnswer(answer.log_probs.to(latents.device), answer.cotangent.to(latents.device))
        return self

    def result(self, timeout_s: float | None = None) -> RewardAnswer:
        return self.answer

    def decode(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents.cpu())

    def class_log_probs(self, inputs: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        answers = self.model.class_log_probs(inputs.cpu(), prompts)
        return {name: answer.to(inputs.device) for name, answer in answers.items()}


def small_config(pipeline: Path, folder: Path) -> TrainConfig:
    """Six trajectories of two guided steps on a small pipeline; a classifier that nobody has fitted lies in `folder`."""
    spec = ControlConfig(oracle="jpeg_size", thresholds=(1000.0, 1200.0, 1400.0), unit="bytes", guidance_strength=2.0)
    save_classifier(folder, "jpeg_size", spec)
    return TrainConfig(
        base_model=str(pipeline),
        controls={"jpeg_size": dataclasses.replace(spec, classifier=str(folder))},
        global_batch_size=6,
        micro_batch_size_per_worker=3,
        sampler=SamplerConfig(num_steps=2, guidance_scale=2.0),
        lora=LoraConfig(rank=2, alpha=2.0),
        evaluation=EvaluationConfig(num_samples=5, batch_size=3),
    )


def learner_on(
    config: TrainConfig,
    device: torch.device,
    *,
    pool: bool,
    make_engine: Callable[[ControlledPolicy], Any] = SGDEngine,
) -> Learner:
    """A worker's learner on the device, with rewards there or (`pool`) on the CPU."""
    spec = RewardModelSpec(
        base_model=config.base_model,
        classifiers={name: str(control.classifier) for name, control in config.controls.items()},
    )
    job = TrainJob(
        config=config,
        controls=config.controls,
        prompts=PROMPTS,
        rewards=spec,
        info=None,  # type: ignore[arg-type]
        channel=None,
    )
    policy = build_policy(config).to(device)
    rank = Rank(0, 1, device)
    learner = make_learner(job, rank, make_engine(policy), load_prompts(job, rank))
    return dataclasses.replace(learner, rewards=CPUPool(load_reward_model(spec))) if pool else learner
