"""The numbers of one call of a pipeline, and the sampler that they make of the trained one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from ctrl_ray.config.fields import at_least, check_fields
from ctrl_ray.config.policy import SamplerConfig
from ctrl_ray.config.values import require


@dataclass(frozen=True, kw_only=True)
class CallConfig:
    """Named as in diffusers' pipelines. None: as the adapter was trained, or as the base model is."""

    num_inference_steps: Annotated[int | None, at_least(1)] = None
    """Denoising steps."""
    guidance_scale: Annotated[float | None, at_least(1)] = None
    """Classifier-free guidance of the prompt. 1 switches it off."""
    control_scale: Annotated[float | None, at_least(0)] = None
    """A guidance scale for the label alone."""
    eta: Annotated[float | None, at_least(0)] = None
    """DDIM stochasticity."""
    adapter_scale: float = 1.0
    """Scale of what the adapter adds."""
    height: Annotated[int | None, at_least(1)] = None
    """In pixels."""
    width: Annotated[int | None, at_least(1)] = None
    """In pixels."""
    num_images_per_prompt: Annotated[int, at_least(1)] = 1
    """Images of each prompt."""
    num_candidates: Annotated[int, at_least(1)] = 1
    """Candidates of each image."""
    candidate_batch_size: Annotated[int | None, at_least(1)] = None
    """Candidates sampled at a time. None: as many as images."""

    def __post_init__(self) -> None:
        check_fields(self)

    def sampler(self, trained: SamplerConfig) -> SamplerConfig:
        """The sampler of this call; ConfigError where no step is left for the policy."""
        steps = trained.num_steps if self.num_inference_steps is None else self.num_inference_steps
        require(
            steps > trained.reference_steps,
            f"num_inference_steps is {steps}, but the last {trained.reference_steps} are the pre-trained model's; expected at "
            f"least {trained.reference_steps + 1}",
        )
        return replace(
            trained,
            num_steps=steps,
            eta=trained.eta if self.eta is None else self.eta,
            guidance_scale=trained.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            control_scale=trained.control_scale if self.control_scale is None else self.control_scale,
        )
