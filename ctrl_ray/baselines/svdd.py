"""Soft value-based decoding (Li et al. 2024, SVDD-PM): at each step one of M next latents, by the reward of its x̂_0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrl_ray.baselines.noise import ImageNoise, ParticleNoise
from ctrl_ray.baselines.particles import drawn
from ctrl_ray.baselines.prediction import Prediction
from ctrl_ray.baselines.sampler import Baseline, Call
from ctrl_ray.baselines.tilt import log_tilt
from ctrl_ray.diffusion.steps import gaussian_sample
from ctrl_ray.gradients.rollout import Trajectory


@dataclass(frozen=True, kw_only=True)
class SVDD(Baseline):
    """Candidate j of a step is kept with probability ∝ e^(ℓ(x̂_0) / α). A step costs M forwards and M decodes.

    The law of the one that is kept tends to the tilt of the step's by e^(ℓ(x̂_0) / α) as M grows, which is the target's only
    where ℓ(x̂_0) is the value of the latents. The density of a path is not known."""

    num_particles: int = 8
    """M."""
    temperature: float = 1.0
    """α; 0: the candidate with the largest ℓ."""
    method: ClassVar[str] = "svdd"

    @property
    def rows_per_image(self) -> int:
        """See `Baseline`."""
        return self.num_particles

    def draw(self, call: Call) -> Trajectory:
        """See `Baseline`."""
        kernel, count, num_images = call.kernel, self.num_particles, len(call.inputs)
        draw = ParticleNoise(call.noise, count)
        many = call.repeated(count)
        latents = draw(0)[::count]
        parents = torch.arange(num_images, device=latents.device).repeat_interleave(count)
        step = call.predict(0, latents).step
        kept = [latents]
        for step_index in range(kernel.num_steps):
            last = step_index == kernel.num_steps - 1
            if kernel.std(step_index) > 0:
                z = draw(step_index + 1)
                candidates = gaussian_sample(step.select(parents), z)
                following = None if last else call.predict(step_index + 1, candidates, many)
                tilts = log_tilt(call.rewards, _clean(candidates, following), many, self.exponents).view(-1, count)
                rows = torch.arange(num_images, device=latents.device) * count
                rows += torch.tensor(self._chosen(tilts, call.noise, step_index), device=latents.device)
                latents, step = candidates[rows], step if following is None else following.step.select(rows)
            else:
                latents = step.mean
                step = step if last else call.predict(step_index + 1, latents).step
            kept.append(latents)
            call.on_step(step_index, latents)
        return Trajectory(torch.stack(kept), call.inputs)

    def _chosen(self, tilts: Tensor, noise: ImageNoise, step_index: int) -> list[int]:
        """The number of each image's candidate; tilts: (B, M)."""
        if self.temperature == 0:
            chosen: list[int] = tilts.argmax(1).tolist()
            return chosen
        return drawn(tilts / self.temperature, noise, step_index, "candidate")


def _clean(latents: Tensor, prediction: Prediction | None) -> Tensor:
    """What the reward is asked about: x̂_0 at the new timestep, after the last step the latents themselves."""
    return latents if prediction is None else prediction.denoised.x_0
