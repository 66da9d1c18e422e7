"""Manifold preserving guided diffusion (He et al. 2024, MPGD, without its projection): x̂_0 moves, ε̃ stays.

x̂_0 ← x̂_0 + ρ ∇_x̂0 ℓ; no gradient goes through the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ctrl_ray.baselines.guided import GuidedSampler
from ctrl_ray.baselines.prediction import Prediction
from ctrl_ray.baselines.sampler import Call
from ctrl_ray.baselines.tilt import log_tilt_and_gradient


@dataclass(frozen=True, kw_only=True)
class MPGD(GuidedSampler):
    """A step costs a forward of the denoiser, and a decode with its gradient."""

    scale: float = 1.0
    """ρ."""
    step_size: Literal["plain", "guidance"] = "plain"
    """'guidance': an image's step has ρ times the root mean square of its classifier-free guidance w (ε_c − ε_∅), whatever the
    gradient's size."""
    method: ClassVar[str] = "mpgd"

    def guided_mean(self, prediction: Prediction, call: Call) -> Tensor:
        """See `GuidedSampler`."""
        _, gradient = log_tilt_and_gradient(call.rewards, prediction.denoised.x_0, call.inputs, self.exponents)
        if self.step_size == "guidance":
            gradient = gradient * (_size(prediction.prompt_pull()) / _size(gradient))
        return prediction.mean_of_shifted_x_0(self.scale * gradient)


def _size(latents: Tensor) -> Tensor:
    """Root mean square over each sample's latents, (B, 1, ...)."""
    square = latents.flatten(1).double().square().mean(1).sqrt().clamp(min=1e-30)
    return square.to(latents.dtype).view(-1, *[1] * (latents.dim() - 1))
