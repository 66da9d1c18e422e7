"""How much work sampling and training are: calls of the denoiser and decodes, counted without a model.

A method draws an image of one number with a denoiser that does nothing, on the preset's own chain of steps, while
`comparison.cost` counts. So no formula has to follow a method that changes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ctrl_ray.baselines.classifier_guidance import ClassifierGuidance
from ctrl_ray.baselines.methods import make_sampler
from ctrl_ray.comparison.cost import Calls, CountedPolicy, CountedRewards
from ctrl_ray.comparison.methods import NOMINAL_TRIES, Setting
from ctrl_ray.config import TrainConfig
from ctrl_ray.diffusion.steps import Guidance, ModelOutput
from ctrl_ray.gradients.rollout import keyed_noise
from ctrl_ray.planning.cost import evaluated_samples
from ctrl_ray.planning.plan import mean_calls, num_branches
from ctrl_ray.policy.analytic import analytic_scheduler
from ctrl_ray.policy.protocol import Condition, Inputs
from ctrl_ray.policy.schedule import load_kernel
from ctrl_ray.rewards.protocol import RewardAnswer


@dataclass(frozen=True)
class Rows:
    """What is computed, in rows of the denoiser and in images."""

    forwards: float = 0.0
    backwards: float = 0.0
    decodes: float = 0.0
    decode_backwards: float = 0.0
    """Of the decodes, those that a gradient goes back through."""

    def __add__(self, other: Rows) -> Rows:
        return Rows(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def __mul__(self, factor: float) -> Rows:
        return Rows(*(factor * value for value in dataclasses.astuple(self)))


def image_rows(setting: Setting, config: TrainConfig, *, adapter: bool = False, judged: bool = False) -> Rows:
    """Of one image, decoded; counted while it is drawn with a denoiser and classifiers that do nothing.

    adapter: of a trained policy. judged: with the KL to the pre-trained model, and with what the classifiers believe, for which
    the image is decoded once more. Of rejection it is NOMINAL_TRIES times a sample.
    """
    sampler = config.sampler
    if setting.control_scale is not None:
        sampler = dataclasses.replace(sampler, control_scale=setting.control_scale)
    kernel = load_kernel(analytic_scheduler(), sampler)
    controls = {name: control.num_classes for name, control in config.controls.items()}
    draw: Any = make_sampler(setting.method, (1.0,) * len(controls), list(controls))
    if isinstance(draw, ClassifierGuidance):
        draw = dataclasses.replace(draw, noised_classifier=tuple(map(_noised, controls.values())))
    calls = Calls()
    labels = torch.zeros(1, len(controls), dtype=torch.long)
    draw(
        CountedPolicy(_Denoiser(), calls),
        kernel,
        Inputs(Condition(("",), {}, {}), labels, Guidance.of(sampler)),
        keyed_noise(0, 0, (0,), _Denoiser.latent_shape, kernel.num_steps),
        CountedRewards(_Classifiers(controls), calls),
        reference=not adapter,
        with_kl=judged,
    )
    tries = NOMINAL_TRIES if setting.method.name == "rejection" else 1.0
    counted = Rows(calls.forwards, calls.backwards, calls.decodes, calls.decode_backwards) * tries
    return counted + Rows(decodes=2 if judged else 1)


def training_rows(config: TrainConfig) -> Rows:
    """Of a whole run: its updates and its evaluations."""
    keeps_none = dataclasses.replace(config.estimator, keep_graphs=False)
    config = dataclasses.replace(config, estimator=keeps_none)
    calls = mean_calls(config, load_kernel(analytic_scheduler(), config.sampler))
    branches, samples = num_branches(config), config.num_updates * config.global_batch_size
    scored = samples if config.draws_trajectories else 0
    updates = Rows(calls.forwards * branches, calls.backwards * branches) * samples + Rows(0, 0, scored, scored)
    policy, pre_trained = (image_rows(Setting(), config, adapter=adapter, judged=True) for adapter in (True, False))
    during, before, after, pairs = evaluated_samples(config)
    return updates + policy * (during + after) + pre_trained * (before + pairs)


class _Denoiser:
    """Predicts its latents."""

    latent_shape = (1,)

    def __call__(self, latents: Tensor, time: Tensor, inputs: Inputs, *, reference: bool) -> ModelOutput:
        return ModelOutput(latents * 1.0)


class _Classifiers:
    """Certain of every class, so that rejection takes the first sample."""

    differentiable = True

    def __init__(self, controls: dict[str, int]) -> None:
        self.controls = controls

    def submit(self, latents: Tensor, prompts: Any, labels: Tensor, weights: Tensor) -> Any:
        answer = RewardAnswer(torch.zeros(labels.shape), torch.zeros_like(latents))
        return SimpleNamespace(result=lambda: answer)

    def class_log_probs(self, inputs: Tensor, prompts: Any) -> dict[str, Tensor]:
        return {name: torch.zeros(len(inputs), count) for name, count in self.controls.items()}


def _noised(num_classes: int) -> Any:
    return lambda latents, timestep, prompts: latents.sum(1, keepdim=True).expand(-1, num_classes) * 0
