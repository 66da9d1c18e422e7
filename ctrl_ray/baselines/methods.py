"""Every baseline that samples, by the name that configurations know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ctrl_ray.baselines.dps import DPS
from ctrl_ray.baselines.mpgd import MPGD
from ctrl_ray.baselines.smc import SMC, TDS, FKSteering
from ctrl_ray.baselines.svdd import SVDD
from ctrl_ray.baselines.tfg import TFG
from ctrl_ray.baselines.tries import BestOfN, Rejection
from ctrl_ray.config.method import MethodConfig
from ctrl_ray.gradients.rollout import Sampler, rollout, rows_per_image

SAMPLERS: dict[str, Callable[..., Any]] = {
    "best_of_n": BestOfN,
    "rejection": Rejection,
    "dps": DPS,
    "mpgd": MPGD,
    "tfg": TFG,
    "smc": SMC,
    "svdd": SVDD,
    "tds": TDS,
    "fk_steering": FKSteering,
}


def make_sampler(method: MethodConfig, exponents: Sequence[float]) -> Sampler:
    """The sampler of a method's settings. exponents: λ of each control, in the order of the label columns."""
    if method.name == "plain":
        return rollout
    sampler: Sampler = SAMPLERS[method.name](exponents=tuple(exponents), **method.given)
    return sampler


def latents_per_image(method: MethodConfig) -> int:
    """How many latents a method holds at a time for each image."""
    return rows_per_image(make_sampler(method, ()))
