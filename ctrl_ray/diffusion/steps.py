"""One denoising step as a Gaussian, and the KL between two of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ctrl_ray.config import NullBranch, SamplerConfig

LatentReduction = Literal["sum", "mean"]
Branch = Literal["null", "prompt", "control"]
"""Rows of a guided batch: without prompt (and labels, unless `null_branch` keeps them), with the prompt alone, with both."""


class ModelOutput(NamedTuple):
    """What a denoiser predicts."""

    prediction: Tensor
    """Like the latents: ε, v or x_0, as the kernel's `prediction_type` says; classifier-free guidance applied."""
    log_std_ratio: Tensor | None = None
    """Logarithm of (learned std / fixed std), like the latents; None: the step's variance is fixed."""


class GaussianStep(NamedTuple):
    """N(mean, std²) of the next latents."""

    mean: Tensor
    """(B, ...) float32."""
    std: Tensor
    """Broadcastable to the mean; 0 = a deterministic step, which has no density."""

    def select(self, rows: Tensor) -> GaussianStep:
        """The laws of some of the samples, in the given order; a std that is a scalar is that of all."""
        return GaussianStep(self.mean[rows], self.std if self.std.dim() == 0 else self.std[rows])


class Scales(NamedTuple):
    """Noisy latents are signal · x_0 + noise · ε: (√ᾱ, √(1−ᾱ)) in DDIM's terms, (1 − σ, σ) in those of a flow."""

    signal: float
    noise: float


class Denoised(NamedTuple):
    """A prediction in the terms that guidance works on, `Scales`: the latents are signal · x_0 + noise · ε."""

    x_0: Tensor
    """The clean latents that are predicted (Tweedie's estimate), like the latents."""
    noise: Tensor
    """ε, like the latents; classifier-free guidance applied."""


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance, combined inside the policy."""

    scale: float = 1.0
    """w in ε_u + w (ε_c − ε_u); 1.0 = off."""
    control_scale: float | None = None
    """Separate scale s of the label direction: ε_u + w (ε_prompt − ε_u) + s (ε_prompt,labels − ε_prompt)."""
    null_branch: NullBranch = "pre_trained"
    """The unconditional branch drops the prompt, and the labels with it or not."""

    @classmethod
    def of(cls, sampler: SamplerConfig) -> Guidance:
        """The guidance that a sampler's settings name."""
        return cls(sampler.guidance_scale, sampler.control_scale, sampler.null_branch)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The denoiser's rows for a sample, in the order of `combine_guidance`: those whose factor is not 0."""
        if self.control_scale is None or self.control_scale == self.scale:
            return ("control",) if self.scale == 1.0 else ("null", "control")
        return ("prompt", "control") if self.scale == 1.0 else ("null", "prompt", "control")

    @property
    def num_branches(self) -> int:
        """Denoiser rows per sample: 1 without guidance, 2 with one scale, 3 where prompt and label have scales of their own."""
        return len(self.branches)


NO_GUIDANCE = Guidance()


class StepKernel(Protocol):
    """A discretised reverse process. step_index runs 0 … num_steps − 1 in sampling order (noise first)."""

    @property
    def num_steps(self) -> int:
        """Number of denoising steps."""
        ...

    def time(self, step_index: int, device: torch.device | str = "cpu") -> Tensor:
        """The scheduler's timestep (a scalar tensor) that the denoiser is called with."""
        ...

    def std(self, step_index: int) -> float:
        """Standard deviation of the step's noise; 0 where the step is deterministic."""
        ...

    def controlled(self, step_index: int) -> bool:
        """Whether the policy takes this step. The reference takes those that never have a density, and the sampler's last
        `reference_steps`: they are a fixed part of the reward."""
        ...

    def step(self, step_index: int, latents: Tensor, output: ModelOutput) -> GaussianStep:
        """The law of the next latents."""
        ...


class DenoisingKernel(StepKernel, Protocol):
    """A reverse process whose predictions can be taken apart and put together again, as guidance at sampling time needs."""

    def scales(self, step_index: int) -> Scales:
        """Of the step's latents."""
        ...

    def next_scales(self, step_index: int) -> Scales:
        """Of the next latents."""
        ...

    def denoised(self, step_index: int, latents: Tensor, output: ModelOutput) -> Denoised:
        """(x_0, ε) that a prediction implies."""
        ...

    def mean_from(self, step_index: int, denoised: Denoised) -> Tensor:
        """The mean of the next latents for any x_0 and ε; of those of `denoised` it is that of `step`."""
        ...


def combine_guidance(branches: tuple[Tensor, ...], guidance: Guidance) -> Tensor:
    """Classifier-free guidance of predictions ordered as `Guidance.branches`.

    `Ho & Salimans 2022`, eq. 6, in the convention where scale 1 is the conditional model.
    """
    if len(branches) == 1:
        return branches[0]
    if len(branches) == 2:
        without, noise_pred_cond = branches
        scale = guidance.control_scale if guidance.control_scale is not None else guidance.scale
        return without + scale * (noise_pred_cond - without)
    noise_pred_uncond, noise_pred_prompt, noise_pred_control = branches
    assert guidance.control_scale is not None
    return (
        noise_pred_uncond
        + guidance.scale * (noise_pred_prompt - noise_pred_uncond)
        + guidance.control_scale * (noise_pred_control - noise_pred_prompt)
    )


def step_kl(policy: GaussianStep, ref: GaussianStep, latent_reduction: LatentReduction = "sum") -> Tensor:
    """KL(policy ‖ ref) of one step, (B,) in nats: Σ [log(s_r/s_p) + (s_p² + (m_p − m_r)²) / (2 s_r²) − 1/2].

    With the fixed, shared variance of CTRL this is ‖mean − ref_mean‖² / (2 std²) (method of CTRL, eq. for KL_k).
    'mean' divides by the number of latent dimensions (parity with the public reference code only).
    Raises ValueError where std is 0: such a step has no density. On a GPU, where looking would wait for it, the answer is
    then not finite.
    """
    if ref.std.device.type == "cpu" and bool((ref.std == 0).any() or (policy.std == 0).any()):
        raise ValueError("a step with std 0 (eta 0, or a last step that ends at ᾱ = 1) has no density, so no KL")
    squared = (policy.mean - ref.mean) ** 2 / (2 * ref.std**2)
    if policy.std is not ref.std:
        ratio = policy.std / ref.std
        squared = squared + (ratio**2 - 1) / 2 - ratio.log()
    flat = squared.flatten(1)
    return flat.sum(1) if latent_reduction == "sum" else flat.mean(1)


def step_log_ratio(sampled: GaussianStep, other: GaussianStep, noise: Tensor) -> Tensor:
    """log sampled(x') / other(x') at x' = mean + std · noise, drawn from `sampled`, (B,) float64 in nats.

    With a fixed, shared variance it is z · u + ½ ‖u‖², u = (mean − other_mean) / std: the noise is taken as it was drawn,
    because the next latents hold it rounded. Its mean over the noise is `step_kl`.
    """
    std = other.std.double()
    z, push, ratio = noise.double(), (sampled.mean.double() - other.mean.double()) / std, sampled.std.double() / std
    terms = ratio * z * push + push**2 / 2 + (ratio**2 - 1) * z**2 / 2 - ratio.log()
    return terms.flatten(1).sum(1)


def gaussian_sample(step: GaussianStep, noise: Tensor) -> Tensor:
    """next_latents = mean + std · noise."""
    return step.mean + step.std * noise


def gaussian_log_prob(step: GaussianStep, value: Tensor) -> Tensor:
    """log N(value; mean, std²) summed over latent dimensions, (B,) in nats."""
    z = (value - step.mean) / step.std
    log_density = -0.5 * z**2 - torch.log(step.std) - 0.5 * math.log(2 * math.pi)
    return log_density.expand_as(step.mean).flatten(1).sum(1)
