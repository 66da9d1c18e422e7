"""Training-free guidance (Ye et al. 2024, TFG): a smoothed reward, guided in x and in x̂_0, with steps repeated.

With f(x̂_0) = log (1/K) Σ_k exp ℓ(x̂_0 + σ_t ξ_k), ξ_k standard normal, the mean of a step is

    m(x̂_0 + Δ, ε̃) + ρ_t ∇_x f(x̂_0(x)) / √(ᾱ/ᾱ'),   Δ: N_iter times  Δ ← Δ + μ_t ∇ f(x̂_0 + Δ),

with ρ_t = ρ · r_t and μ_t = μ · r_t, r_t ∝ ᾱ/ᾱ' of mean 1 over the steps, and σ_t = σ √(1 − ᾱ). N_recur > 1 takes a step so
often, noised again in between: its path then has no density that is known.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrl_ray.baselines.guided import GuidedSampler
from ctrl_ray.baselines.prediction import Prediction
from ctrl_ray.baselines.sampler import Call
from ctrl_ray.baselines.tilt import log_tilt_and_gradient
from ctrl_ray.diffusion.steps import DenoisingKernel


@dataclass(frozen=True, kw_only=True)
class TFG(GuidedSampler):
    """A step costs N_recur times a forward and a backward of the denoiser, and K · N_iter decodes with their gradient."""

    scale: float = 1.0
    """ρ: strength of the gradient through the denoiser; 0 leaves its backward out of the sum."""
    mean_scale: float = 1.0
    """μ: strength of the gradient in x̂_0."""
    smoothing: float = 0.01
    """σ of the noise on x̂_0."""
    num_smoothed: int = 4
    """K."""
    num_iterations: int = 4
    """N_iter."""
    num_recurrences: int = 1
    """N_recur."""
    method: ClassVar[str] = "tfg"
    through_denoiser: ClassVar[bool] = True

    @property
    def has_path_law(self) -> bool:
        """Given the ξ, which are drawn apart from the path's noise; not with steps that are repeated."""
        return self.num_recurrences == 1

    def guided_mean(self, prediction: Prediction, call: Call) -> Tensor:
        """See `GuidedSampler`."""
        kernel, step_index = prediction.kernel, prediction.step_index
        growth = kernel.next_scales(step_index).signal / kernel.scales(step_index).signal
        ratio = _relative_ratio(kernel, step_index)
        smooth = self._smoothed(prediction, call)
        x_0 = prediction.denoised.x_0.detach()
        gradient = smooth(x_0)
        through = prediction.pull_back(gradient)
        shift = torch.zeros_like(x_0)
        for iteration in range(self.num_iterations):
            if iteration > 0:
                gradient = smooth(x_0 + shift)
            shift = shift + self.mean_scale * ratio * gradient
        mean = prediction.mean_of_shifted_x_0(shift)
        return mean + self.scale * ratio * growth * through

    def _smoothed(self, prediction: Prediction, call: Call) -> Callable[[Tensor], Tensor]:
        """x̂_0 to ∇ log (1/K) Σ_k exp ℓ(x̂_0 + σ_t ξ_k), with the same ξ at every call of a step."""
        level = prediction.kernel.scales(prediction.step_index).noise
        x_0, count = prediction.denoised.x_0, self.num_smoothed
        shape = x_0.shape[1:]
        xi = call.noise.normal(prediction.step_index, "smoothing", count, shape, x_0.detach())
        moved = self.smoothing * level * xi
        repeated = call.repeated(count)

        def gradient(x_0: Tensor) -> Tensor:
            around = x_0.repeat_interleave(count, dim=0) + moved
            tilts, gradients = log_tilt_and_gradient(call.rewards, around, repeated, self.exponents)
            shares = tilts.view(-1, count).softmax(1).view(-1, *[1] * len(shape)).to(gradients.dtype)
            return (shares * gradients).view(-1, count, *shape).sum(1)

        return gradient

    def step(
        self, call: Call, step_index: int, latents: Tensor, z: Tensor | None, *, guided: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `GuidedSampler`."""
        here, there = call.kernel.scales(step_index), call.kernel.next_scales(step_index)
        kept = here.signal / there.signal
        added = max(0.0, here.noise**2 - (kept * there.noise) ** 2) ** 0.5
        for recurrence in range(1, self.num_recurrences if guided else 1):
            shape = latents.shape[1:]
            forth, back = (
                call.noise.normal(step_index, f"{way} {recurrence}", 1, shape, latents) for way in ("forth", "back")
            )
            following, *_ = super().step(call, step_index, latents, forth, guided=True)
            latents = kept * following + added * back
        return super().step(call, step_index, latents, z, guided=guided)


def _relative_ratio(kernel: DenoisingKernel, step_index: int) -> float:
    """ᾱ/ᾱ' of a step, the square of what the step leaves of the signal, over its mean over all steps."""
    ratios = [(kernel.scales(k).signal / kernel.next_scales(k).signal) ** 2 for k in range(kernel.num_steps)]
    return ratios[step_index] * len(ratios) / sum(ratios)
