"""Noise on clean latents as a denoiser was trained on it, for what is fitted to labelled images."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ctrl_ray.config import TrainConfig
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.backbones.base import NoiseLevels


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """The noise that a denoiser was trained on."""

    levels: NoiseLevels

    @classmethod
    def of(cls, config: TrainConfig) -> NoiseSchedule:
        """That of a run's base model."""
        return cls(load_backbone(config.base_model, config.base_revision, config.sampler).noise_levels())

    def __len__(self) -> int:
        return len(self.levels.signal)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """signal x_0 + noise ε of latents (B, ...) at timesteps (B,)."""
        signal, share = self._factors(timesteps, latents)
        return signal * latents + share * noise

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What a perfect denoiser predicts of the noised latents, like them: ε, x_0, v = √ᾱ ε − √(1 − ᾱ) x_0, or a flow's
        velocity ε − x_0."""
        kind = self.levels.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return latents
        if kind == "flow":
            return noise - latents
        if kind == "v_prediction":
            signal, share = self._factors(timesteps, latents)
            return signal * noise - share * latents
        raise ConfigError(f"prediction_type {kind!r} is unknown; expected epsilon, v_prediction, sample, or flow")

    def _factors(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(signal, noise), each (B, 1, ...)."""
        shape = (-1, *[1] * (like.dim() - 1))
        signal, share = (
            table.to(timesteps.device)[timesteps].view(shape).to(like.dtype)
            for table in (self.levels.signal, self.levels.noise)
        )
        return signal, share
