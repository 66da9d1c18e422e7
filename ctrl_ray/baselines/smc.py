"""The filters of the field: bootstrap SMC, the twisted diffusion sampler, FK steering."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ctrl_ray.baselines.particles import ParticleFilter


@dataclass(frozen=True, kw_only=True)
class SMC(ParticleFilter):
    """Bootstrap filter: the pre-trained model's steps, and e^(ℓ(x̂_0(x')) − ℓ(x̂_0(x))) after each."""

    method: ClassVar[str] = "smc"


@dataclass(frozen=True, kw_only=True)
class TDS(ParticleFilter):
    """Twisted diffusion sampler (Wu et al. 2023): steps of reconstruction guidance, weighed back to the pre-trained model's."""

    scale: float = 1.0
    """Of the guidance in the proposal; any gives the same target."""
    method: ClassVar[str] = "tds"

    @property
    def twist(self) -> float:
        """See `ParticleFilter`."""
        return self.scale


@dataclass(frozen=True, kw_only=True)
class FKSteering(ParticleFilter):
    """Feynman–Kac steering (Singhal et al. 2025): the pre-trained model's steps, and potentials at every few of them."""

    every: int = 5
    """Steps between two potentials."""
    method: ClassVar[str] = "fk_steering"

    def asks(self, step_index: int) -> bool:
        """Not before the first step, where x̂_0 is a blur."""
        return step_index > 0 and step_index % self.every == 0
