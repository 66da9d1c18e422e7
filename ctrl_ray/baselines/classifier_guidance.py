"""Classifier guidance (Dhariwal & Nichol 2021): ε ← ε̃ − w √(1 − ᾱ) ∇_x log p(y|x_t, t), by a classifier of noised latents.

With the exact p(y|x_t, t) and w = 1 it is the same sampler of the conditional data law p(x|y). That is the target only up to
the sampler's own error: the target tilts the law that the discrete sampler draws. At λ ≠ 1 it is a heuristic with w = λ, since
the gradient of log E[p(y|x_0)^λ | x_t] is not λ times that of log p(y|x_t).
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ctrl_ray.baselines.dps import dps_mean
from ctrl_ray.baselines.guided import GuidedSampler
from ctrl_ray.baselines.noised_classifier import LAYOUT, NoisedClassifier
from ctrl_ray.baselines.prediction import Prediction
from ctrl_ray.baselines.sampler import Call
from ctrl_ray.baselines.tilt import log_prob_of
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.backbones.base import Backbone
from ctrl_ray.policy.identity import part_identity


class NoisedLogProbs(Protocol):
    """What guides in the place of a folder."""

    def __call__(self, latents: Tensor, timestep: Tensor, prompts: tuple[str, ...]) -> Tensor:
        """log p(y|x_t, t, c), (B, K), differentiable in the latents (B, ...); timestep: a scalar."""
        ...


@dataclass(frozen=True, kw_only=True)
class ClassifierGuidance(GuidedSampler):
    """A step costs a forward of the denoiser, and a forward and backward of a small network on the latents.

    The reward is not asked, and no gradient goes through the denoiser.
    """

    noised_classifier: tuple[str | NoisedLogProbs, ...] = ()
    """Of each control, in the order of the label columns: the folder of a fitted classifier, or what answers in its place."""
    controls: tuple[str, ...] = ()
    """Names of the controls that the folders must be of; none: it is not looked at."""
    scale: float = 1.0
    """The gradient's weight w of each control is `scale` times its exponent: exponents of 1 are the textbook's form, and 1 is
    nominal."""
    method: ClassVar[str] = "classifier_guidance"
    needs_rewards: ClassVar[bool] = False

    @property
    def folders(self) -> tuple[str, ...]:
        """See `Baseline`."""
        return tuple(given for given in self.noised_classifier if isinstance(given, str))

    def reading(self, folders: Sequence[str]) -> ClassifierGuidance:
        """See `Baseline`."""
        place = dict(zip(self.folders, folders, strict=True))
        given = tuple(place[each] if isinstance(each, str) else each for each in self.noised_classifier)
        return replace(self, noised_classifier=given)

    def guided_mean(self, prediction: Prediction, call: Call) -> Tensor:
        """See `GuidedSampler`. ConfigError where classifiers and exponents are not as many."""
        if len(self.noised_classifier) != len(self.exponents):
            raise ConfigError(
                f"method classifier_guidance needs a noised classifier for each control, got {len(self.noised_classifier)} for "
                f"{len(self.exponents)} controls; fit them with `python -m ctrl_ray.classify --noised` and give them by "
                "--method.noised-classifier NAME=FOLDER"
            )
        latents = prediction.latents.detach()
        timestep = prediction.kernel.time(prediction.step_index, latents.device)
        backbone = getattr(call.policy, "backbone", None)
        with torch.enable_grad():
            leaf = latents.requires_grad_(True)
            total = leaf.new_zeros(())
            for column, (given, exponent) in enumerate(zip(self.noised_classifier, self.exponents, strict=True)):
                log_probs = self._classifier(column, given, latents.device, backbone)(
                    leaf, timestep, call.inputs.condition.prompts
                )
                total = total + exponent * log_prob_of(log_probs, call.inputs.labels[:, column]).sum()
            (gradient,) = torch.autograd.grad(total, leaf)
        return dps_mean(prediction, gradient, self.scale)

    def _classifier(
        self, column: int, given: str | NoisedLogProbs, device: torch.device, backbone: Backbone | None = None
    ) -> NoisedLogProbs:
        if not isinstance(given, str):
            return given
        classifier = _loaded(given, self.controls[column] if self.controls else None, str(device))
        if backbone is not None and classifier.vae is not None:
            _warn_of_other_latents(given, classifier.vae, classifier.base_model, backbone.folder)
        return classifier


@functools.lru_cache(maxsize=8)
def _loaded(folder: str, control: str | None, device: str) -> NoisedClassifier:
    """Read once in each process."""
    return NoisedClassifier.from_pretrained(folder, control, device)


@functools.lru_cache(maxsize=8)
def _warn_of_other_latents(folder: str, vae: str, base_model: str, pipeline: str) -> None:
    """Once in each process: a classifier knows the latents of one VAE."""
    own = part_identity(pipeline, "vae").sha256
    if own != vae:
        warnings.warn(
            f"the noised classifier {folder} was fitted on latents of {base_model}, whose VAE is {vae[:12]}…, and guides a "
            f"model whose VAE is {own[:12]}…; fit it again on this one with `{LAYOUT.command}`",
            UserWarning,
            stacklevel=2,
        )
