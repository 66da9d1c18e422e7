"""Sampling with a push at every step: the loop that reconstruction guidance, MPGD, TFG and classifier guidance share.

A guided step is N(mean of the method, s²) where the pre-trained one is N(m, s²). Its KL is ½ ‖(mean − m) / s‖², and paths have
a density, so that a guided sampler has the certificate of a policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from ctrl_ray.baselines.noise import ImageNoise
from ctrl_ray.baselines.prediction import Prediction, guides, predict, require_reference
from ctrl_ray.baselines.tilt import require_rewards
from ctrl_ray.diffusion.steps import DenoisingKernel, GaussianStep, gaussian_sample, step_kl, step_log_ratio
from ctrl_ray.gradients.rollout import NoiseSource, Trajectory
from ctrl_ray.policy.protocol import Inputs, Policy
from ctrl_ray.rewards.protocol import Rewards


@dataclass(frozen=True, kw_only=True)
class GuidedSampler:
    """A `Sampler` whose subclasses say the mean of a guided step."""

    exponents: tuple[float, ...]
    """λ of each control, in the order of the label columns."""
    window: tuple[float, float] = (0.0, 1.0)
    """Shares of the steps between which the sampler is guided, noise first."""
    method: ClassVar[str]
    through_denoiser: ClassVar[bool] = False
    """Whether `guided_mean` pulls gradients back through the denoiser."""
    needs_gradient: ClassVar[bool] = True
    """Whether the reward must have a gradient."""
    needs_rewards: ClassVar[bool] = True
    """Whether `guided_mean` asks the reward; where it does not, there may be none."""

    def guided_mean(self, prediction: Prediction, rewards: Rewards, inputs: Inputs, noise: ImageNoise) -> Tensor:
        """The next mean, like the latents, without a graph."""
        raise NotImplementedError

    @property
    def has_path_law(self) -> bool:
        """Whether the density of a path is known."""
        return True

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
        """See `Sampler`; with_kl: KL and log-ratio to the pre-trained model, where the path's density is known.

        Raises ConfigError for a policy in place of the pre-trained model, for rewards that are missing or without the
        gradient that the method needs, and where no step has noise.
        """
        require_reference(kernel, self.method, reference=reference)
        if self.needs_rewards:
            rewards = require_rewards(rewards, self.method, gradient=self.needs_gradient)
        asked = cast(Rewards, rewards)
        own = ImageNoise(noise)
        latents = own(0)
        kept, kls, log_ratio = [latents], [], torch.zeros(len(latents), dtype=torch.float64, device=latents.device)
        for step_index in range(kernel.num_steps):
            guided = guides(kernel, step_index) and self.in_window(step_index, kernel.num_steps)
            z = own(step_index + 1) if kernel.std(step_index) > 0 else None
            latents, kl, ratio = self._step(policy, kernel, step_index, latents, inputs, asked, own, z, guided)
            kls.append(kl)
            log_ratio += ratio
            kept.append(latents)
            if on_step is not None:
                on_step(step_index, latents)
        if not (with_kl and self.has_path_law):
            return Trajectory(torch.stack(kept), inputs)
        return Trajectory(torch.stack(kept), inputs, torch.stack(kls, dim=1), log_ratio)

    def in_window(self, step_index: int, num_steps: int) -> bool:
        """Whether the step is between the window's shares."""
        low, high = self.window
        return low * num_steps <= step_index < high * num_steps

    def _step(
        self,
        policy: Policy,
        kernel: DenoisingKernel,
        step_index: int,
        latents: Tensor,
        inputs: Inputs,
        rewards: Rewards,
        noise: ImageNoise,
        z: Tensor | None,
        guided: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(next latents, KL of the step (B,), log-ratio of the step (B,) float64)."""
        nothing = latents.new_zeros(len(latents))
        prediction = predict(policy, kernel, step_index, latents, inputs, with_graph=guided and self.through_denoiser)
        ref = prediction.step
        if not guided:
            return ref.mean if z is None else gaussian_sample(ref, z), nothing, nothing.double()
        assert z is not None
        step = GaussianStep(self.guided_mean(prediction, rewards, inputs, noise), ref.std)
        return gaussian_sample(step, z), step_kl(step, ref), step_log_ratio(step, ref, z)
