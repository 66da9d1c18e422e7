"""The flow's ancestral step as a diffusers scheduler: what an adapter of ours samples with in a stock pipeline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ctrl_ray.config import FlowSDE
from ctrl_ray.diffusion.flow import FlowKernel, shifted_sigmas
from ctrl_ray.diffusion.steps import ModelOutput, gaussian_sample
from ctrl_ray.errors import ConfigError


class SchedulerOutput(NamedTuple):
    """What `AncestralFlowScheduler.step` returns."""

    prev_sample: Tensor


class AncestralFlowScheduler(SchedulerMixin, ConfigMixin):
    """Flow matching with noise at every step, by the very kernel that CTRL trains with (`ctrl_ray.diffusion.flow`).

    Stock pipelines of flow models have no eta and hand their scheduler no generator. So η and the SDE are the scheduler's
    settings, saved with the pipeline, and the noise comes from `generator`: yours, or one that starts anew at `seed` with
    each call of the pipeline, or torch's own where both are None.

        import ctrl_ray  # diffusers finds the class only where its package is imported
        pipe = StableDiffusion3Pipeline.from_pretrained(BASE)
        pipe.scheduler = ctrl_ray.AncestralFlowScheduler.from_config(pipe.scheduler.config, seed=0)
    """

    order = 1
    has_compatibles = False

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        sde: FlowSDE = "ancestral",
        eta: float = 1.0,
        seed: int | None = None,
    ) -> None:
        """The first seven as in diffusers' FlowMatchEulerDiscreteScheduler; sde, eta: of `FlowKernel`."""
        self.generator: torch.Generator | None = None
        self.init_noise_sigma = 1.0
        self.num_inference_steps: int | None = None
        self.set_timesteps(num_train_timesteps, mu=0.0)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Choose the steps: so many, evenly spaced, or at `sigmas`; shifted once, by `shift` or, with dynamic shifting,
        by e^mu."""
        if num_inference_steps is None and sigmas is None:
            raise ConfigError("set_timesteps was given neither num_inference_steps nor sigmas; give one of them")
        if self.config.use_dynamic_shifting and mu is None:
            raise ConfigError(
                "this scheduler shifts by the number of tokens, and no mu was given; give mu to set_timesteps"
            )
        if sigmas is None:
            assert num_inference_steps is not None
            sigmas = [1 - index / num_inference_steps for index in range(num_inference_steps)]
        shift = self.config.shift
        if self.config.use_dynamic_shifting:
            assert mu is not None
            shift = math.exp(mu)
        table = shifted_sigmas([float(sigma) for sigma in sigmas], shift)
        scale = self.config.num_train_timesteps
        self._kernel = FlowKernel(table, sde=self.config.sde, eta=self.config.eta, time_scale=scale)
        self.num_inference_steps = len(table) - 1
        self.sigmas = torch.tensor(table, dtype=torch.float32, device=device)
        self.timesteps = torch.tensor([scale * sigma for sigma in table[:-1]], dtype=torch.float32, device=device)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._own: torch.Generator | None = None

    @property
    def step_index(self) -> int | None:
        """The next step's; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The first step's, where the pipeline has set it."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """For pipelines that do not begin with noise."""
        self._begin_index = begin_index

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The next latents, computed in float32, in the prediction's type.

        generator: in the place of the scheduler's own. variance_noise: in the place of drawn noise, like the sample.
        """
        if self._step_index is None:
            self._step_index = self._index_of(timestep) if self._begin_index is None else self._begin_index
        step = self._kernel.step(self._step_index, sample.float(), ModelOutput(model_output.float()))
        following = step.mean
        if self._kernel.std(self._step_index) > 0:
            noise = variance_noise
            if noise is None:
                noise = randn_tensor(
                    sample.shape,
                    generator=generator or self._generator(sample.device),
                    device=sample.device,
                    dtype=torch.float32,
                )
            following = gaussian_sample(step, noise.float())
        self._step_index += 1
        following = following.to(model_output.dtype)
        return SchedulerOutput(following) if return_dict else (following,)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """(1 − σ) sample + σ noise, for pipelines that begin with an image; timestep: (B,), of `timesteps`."""
        sigmas = self.sigmas.to(sample)[[self._index_of(each) for each in timestep]]
        sigmas = sigmas.view(-1, *[1] * (sample.dim() - 1))
        return (1 - sigmas) * sample + sigmas * noise

    def _generator(self, device: torch.device) -> torch.Generator | None:
        if self.generator is not None or self.config.seed is None:
            return self.generator
        if self._own is None:
            self._own = torch.Generator(device).manual_seed(self.config.seed)
        return self._own

    def _index_of(self, timestep: float | Tensor) -> int:
        found = (self.timesteps == torch.as_tensor(timestep).to(self.timesteps)).nonzero()
        if not len(found):
            raise ConfigError(
                f"timestep {float(timestep):g} is not one of this scheduler's; give one of its `timesteps`"
            )
        return int(found[0])

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)
