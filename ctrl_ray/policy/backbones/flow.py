"""What the families that were trained by flow matching share: their chain of steps, and a transformer over patches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from ctrl_ray.config import SamplerConfig
from ctrl_ray.diffusion.flow import FlowKernel
from ctrl_ray.policy.backbones.base import DiffusersBackbone, NoiseLevels, Row
from ctrl_ray.policy.flow_schedule import check_flow_schedule, flow_kernel, flow_scheduler
from ctrl_ray.policy.flow_scheduler import AncestralFlowScheduler


class FlowBackbone(DiffusersBackbone):
    """A `DiffusersBackbone` whose network, a transformer over patches, predicts a velocity."""

    denoiser = "transformer"
    reads_any_length = True
    rows_of_samples: ClassVar[tuple[str, ...]] = ("norm1.linear", "norm1_context.linear", "norm_out.linear")
    """Layers whose rows are samples: what scales and shifts a block by the time; a family adds those of the time itself."""

    usage_imports = ("import ctrl_ray  # its scheduler: diffusers has none with noise at every step",)

    def size_unit(self) -> int:
        """Whole patches."""
        return self.pixels_per_latent() * int(self.component_config(self.denoiser)["patch_size"])

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        config = self.component_config(self.denoiser)
        return (int(config["in_channels"]), int(config["sample_size"]), int(config["sample_size"]))

    def output_layers(self, denoiser: nn.Module) -> Sequence[nn.Module]:
        """The last projection; the norm before it has no weights of its own."""
        return [denoiser.get_submodule("proj_out")]

    def adapted_layers(self, denoiser: nn.Module) -> dict[str, Row]:
        """Every linear layer and convolution."""
        return {
            name: "sample" if any(f".{part}" in f".{name}" for part in self.rows_of_samples) else "token"
            for name, module in denoiser.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }

    def check_schedule(self, config: Mapping[str, Any], whose: str) -> None:
        """See `Backbone`."""
        check_flow_schedule(config, whose)

    @cached_property
    def scheduler(self) -> AncestralFlowScheduler:
        """Ours, with the pipeline's shift."""
        return flow_scheduler(self.component_config("scheduler"))

    def make_kernel(self, sampler: SamplerConfig, scheduler_config: Mapping[str, Any] | None = None) -> FlowKernel:
        """See `Backbone`."""
        config = self.scheduler.config if scheduler_config is None else scheduler_config
        return flow_kernel(config, sampler, num_tokens=self.num_tokens_of_latents())

    def noise_levels(self) -> NoiseLevels:
        """See `Backbone`: σ = t / T."""
        count = int(self.scheduler.config.num_train_timesteps)
        sigmas = torch.arange(count, dtype=torch.float64) / count
        return NoiseLevels(1 - sigmas, sigmas, "flow")

    def num_tokens_of_latents(self) -> int:
        """At the size that is drawn."""
        patch = int(self.component_config(self.denoiser).get("patch_size", 1))
        return math.prod(self.latent_shape[1:]) // patch**2

    def prepare_call(self, pipeline: Any, sampler: SamplerConfig, generator: torch.Generator) -> dict[str, Any]:
        """See `Backbone`: the scheduler holds the noise's settings and its generator."""
        pipeline.scheduler = flow_scheduler(pipeline.scheduler.config, sampler)
        pipeline.scheduler.generator = generator
        return {"generator": generator, **sampler.call_options()}

    def usage_scheduler(self, sampler: SamplerConfig) -> tuple[str, str]:
        """See `Backbone`."""
        settings = f"eta={sampler.eta:g}, sde={sampler.flow_sde!r}, seed=0"
        return f"ctrl_ray.AncestralFlowScheduler.from_config(SCHEDULER, {settings})", ""
