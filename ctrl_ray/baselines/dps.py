"""Reconstruction guidance: diffusion posterior sampling (Chung et al. 2023, DPS) on the log-probability of a classifier.

ε ← ε̃ − w √(1 − ᾱ) ∇_x ℓ(x̂_0(x)), the gradient through the denoiser. At eta = 1 the mean moves by
w (1 − ᾱ/ᾱ') / √(ᾱ/ᾱ') ∇_x ℓ. ℓ(x̂_0) stands for log E[e^ℓ | x], so the law is not the target's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ctrl_ray.baselines.guided import GuidedSampler
from ctrl_ray.baselines.prediction import Prediction
from ctrl_ray.baselines.sampler import Call
from ctrl_ray.baselines.tilt import log_tilt_and_gradient


@dataclass(frozen=True, kw_only=True)
class DPS(GuidedSampler):
    """A step costs a forward and a backward of the denoiser, and a decode with its gradient."""

    scale: float = 1.0
    """w; 1 is nominal."""
    method: ClassVar[str] = "dps"
    through_denoiser: ClassVar[bool] = True

    def guided_mean(self, prediction: Prediction, call: Call) -> Tensor:
        """See `GuidedSampler`."""
        _, gradient = log_tilt_and_gradient(call.rewards, prediction.denoised.x_0, call.inputs, self.exponents)
        return dps_mean(prediction, prediction.pull_back(gradient), self.scale)


def dps_mean(prediction: Prediction, gradient: Tensor, scale: float) -> Tensor:
    """The next mean with ε̃ − scale √(1 − ᾱ) gradient (a flow: ε̃ − scale σ gradient); gradient: of log p with respect to the
    noisy latents, like them."""
    return prediction.mean_of_shifted_noise(-scale * prediction.kernel.scales(prediction.step_index).noise * gradient)
