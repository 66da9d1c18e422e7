"""Soft value-based decoding (Li et al. 2024, SVDD-PM): at each step one of M next latents, by the reward of its x̂_0."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrl_ray.baselines.noise import ImageNoise, ParticleNoise
from ctrl_ray.baselines.particles import drawn
from ctrl_ray.baselines.prediction import Prediction, predict, require_reference
from ctrl_ray.baselines.tilt import log_tilt, require_rewards
from ctrl_ray.diffusion.steps import DenoisingKernel, gaussian_sample
from ctrl_ray.gradients.rollout import NoiseSource, Trajectory
from ctrl_ray.policy.protocol import Inputs, Policy
from ctrl_ray.rewards.protocol import Rewards


@dataclass(frozen=True, kw_only=True)
class SVDD:
    """A `Sampler`: candidate j of a step is kept with probability ∝ e^(ℓ(x̂_0) / α). A step costs M forwards and M decodes.

    The law of one candidate tends to the tilt of the step's by e^(ℓ(x̂_0) / α) as M grows, which is the target's only where
    ℓ(x̂_0) is the value of the latents."""

    exponents: tuple[float, ...]
    """λ of each control, in the order of the label columns."""
    num_particles: int = 8
    """M."""
    temperature: float = 1.0
    """α; 0: the candidate with the largest ℓ."""
    method: ClassVar[str] = "svdd"

    @property
    def rows_per_image(self) -> int:
        """Latents that are held for each image."""
        return self.num_particles

    @torch.no_grad()
    def __call__(
        self,
        policy: Policy,
        kernel: DenoisingKernel,
        inputs: Inputs,
        noise: NoiseSource,
        rewards: Rewards | None = None,
        *,
        reference: bool = True,
        with_kl: bool = False,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Trajectory:
        """See `Sampler`; the density of a path is not known, so there is no KL. ConfigError as of the other methods."""
        require_reference(kernel, self.method, reference=reference)
        rewards = require_rewards(rewards, self.method, gradient=False)
        own, count = ImageNoise(noise), self.num_particles
        draw = ParticleNoise(own, count)
        parents = torch.arange(len(inputs)).repeat_interleave(count)
        many = inputs.select(parents.tolist())
        latents = draw(0)[::count]
        step = predict(policy, kernel, 0, latents, inputs).step
        kept = [latents]
        for step_index in range(kernel.num_steps):
            last = step_index == kernel.num_steps - 1
            if kernel.std(step_index) > 0:
                z = draw(step_index + 1)
                candidates = gaussian_sample(step.select(parents), z)
                following = None if last else predict(policy, kernel, step_index + 1, candidates, many)
                tilts = log_tilt(rewards, _clean(candidates, following), many, self.exponents).view(-1, count)
                rows = torch.arange(len(inputs), device=latents.device) * count
                rows += torch.tensor(self._chosen(tilts, own, step_index), device=latents.device)
                latents, step = candidates[rows], step if following is None else following.step.select(rows)
            else:
                latents = step.mean
                step = step if last else predict(policy, kernel, step_index + 1, latents, inputs).step
            kept.append(latents)
            if on_step is not None:
                on_step(step_index, latents)
        return Trajectory(torch.stack(kept), inputs)

    def _chosen(self, tilts: Tensor, noise: ImageNoise, step_index: int) -> list[int]:
        """The number of each image's candidate; tilts: (B, M)."""
        if self.temperature == 0:
            chosen: list[int] = tilts.argmax(1).tolist()
            return chosen
        return drawn(tilts / self.temperature, noise, step_index, "candidate")


def _clean(latents: Tensor, prediction: Prediction | None) -> Tensor:
    """What the reward is asked about: x̂_0 at the new timestep, after the last step the latents themselves."""
    return latents if prediction is None else prediction.denoised.x_0
