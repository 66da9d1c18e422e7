"""Sampling with a push at every step: the loop that reconstruction guidance, MPGD, TFG and classifier guidance share.

A guided step is N(mean of the method, s²) where the pre-trained one is N(m, s²). Its KL is ½ ‖(mean − m) / s‖², and paths have
a density, so that a guided sampler has the certificate of a policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrl_ray.baselines.prediction import Prediction, guides
from ctrl_ray.baselines.sampler import Baseline, Call
from ctrl_ray.diffusion.steps import GaussianStep, gaussian_sample, step_kl, step_log_ratio
from ctrl_ray.gradients.rollout import Trajectory


@dataclass(frozen=True, kw_only=True)
class GuidedSampler(Baseline):
    """A baseline whose subclasses say the mean of a guided step."""

    window: tuple[float, float] = (0.0, 1.0)
    """Shares of the steps between which the sampler is guided, noise first."""
    through_denoiser: ClassVar[bool] = False
    """Whether `guided_mean` pulls gradients back through the denoiser."""

    def guided_mean(self, prediction: Prediction, call: Call) -> Tensor:
        """The next mean, like the latents, without a graph."""
        raise NotImplementedError

    @property
    def needs_gradient(self) -> bool:
        """See `Baseline`."""
        return self.needs_rewards

    @property
    def has_path_law(self) -> bool:
        """Whether the density of a path is known."""
        return True

    def draw(self, call: Call) -> Trajectory:
        """See `Baseline`."""
        kernel, latents = call.kernel, call.noise(0)
        kept, kls, log_ratio = [latents], [], torch.zeros(len(latents), dtype=torch.float64, device=latents.device)
        for step_index in range(kernel.num_steps):
            guided = guides(kernel, step_index) and self.in_window(step_index, kernel.num_steps)
            z = call.noise(step_index + 1) if kernel.std(step_index) > 0 else None
            latents, kl, ratio = self.step(call, step_index, latents, z, guided=guided)
            kls.append(kl)
            log_ratio += ratio
            kept.append(latents)
            call.on_step(step_index, latents)
        if not self.has_path_law:
            return Trajectory(torch.stack(kept), call.inputs)
        return Trajectory(torch.stack(kept), call.inputs, torch.stack(kls, dim=1), log_ratio)

    def in_window(self, step_index: int, num_steps: int) -> bool:
        """Whether the step is between the window's shares."""
        low, high = self.window
        return low * num_steps <= step_index < high * num_steps

    def step(
        self, call: Call, step_index: int, latents: Tensor, z: Tensor | None, *, guided: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(next latents, KL of the step (B,), log-ratio of the step (B,) float64); z: the step's noise."""
        nothing = latents.new_zeros(len(latents))
        prediction = call.predict(step_index, latents, with_graph=guided and self.through_denoiser)
        ref = prediction.step
        if not guided:
            return ref.mean if z is None else gaussian_sample(ref, z), nothing, nothing.double()
        assert z is not None
        step = GaussianStep(self.guided_mean(prediction, call), ref.std)
        return gaussian_sample(step, z), step_kl(step, ref), step_log_ratio(step, ref, z)
