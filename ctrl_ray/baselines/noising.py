"""Noise on clean latents as a denoiser was trained on it, for what is fitted to labelled images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ctrl_ray.config import TrainConfig
from ctrl_ray.diffusion.ddim import PredictionType
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.schedule import ddim_scheduler


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise that a denoiser was trained on."""

    alphas_cumprod: Tensor
    """(T,) ᾱ of every training timestep."""
    prediction_type: PredictionType
    """What the denoiser predicts."""

    @classmethod
    def of(cls, config: TrainConfig) -> NoiseSchedule:
        """That of a run's base model."""
        scheduler = ddim_scheduler(load_backbone(config.base_model, config.base_revision).scheduler_config())
        return cls(scheduler.alphas_cumprod, scheduler.config.prediction_type)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ x_0 + √(1 − ᾱ) ε of latents (B, ...) at timesteps (B,)."""
        signal, share = self._factors(timesteps, latents)
        return signal * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect denoiser predicts of the noised latents, like them: ε, v = √ᾱ ε − √(1 − ᾱ) x_0, or x_0."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return latents
        if self.prediction_type == "v_prediction":
            signal, share = self._factors(timesteps, latents)
            return signal * noise - share * latents
        raise ConfigError(
            f"prediction_type {self.prediction_type!r} is unknown; expected epsilon, v_prediction or sample"
        )

    def _factors(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(√ᾱ, √(1 − ᾱ)), each (B, 1, ...)."""
        alphas = self.alphas_cumprod.to(timesteps.device)[timesteps].double().view(-1, *[1] * (like.dim() - 1))
        return alphas.sqrt().to(like.dtype), (1 - alphas).sqrt().to(like.dtype)
