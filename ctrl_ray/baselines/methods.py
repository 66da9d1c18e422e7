"""Every baseline that samples, by the name that configurations know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ctrl_ray.baselines.classifier_guidance import ClassifierGuidance
from ctrl_ray.baselines.dps import DPS
from ctrl_ray.baselines.mpgd import MPGD
from ctrl_ray.baselines.smc import SMC, TDS, FKSteering
from ctrl_ray.baselines.svdd import SVDD
from ctrl_ray.baselines.tfg import TFG
from ctrl_ray.baselines.tries import BestOfN, Rejection
from ctrl_ray.config.method import NOISED_EXAMPLE, MethodConfig
from ctrl_ray.config.paths import absolute_path
from ctrl_ray.errors import ConfigError
from ctrl_ray.gradients.rollout import Sampler, rollout, rows_per_image

SAMPLERS: dict[str, Callable[..., Any]] = {
    "best_of_n": BestOfN,
    "rejection": Rejection,
    "dps": DPS,
    "mpgd": MPGD,
    "tfg": TFG,
    "classifier_guidance": ClassifierGuidance,
    "smc": SMC,
    "svdd": SVDD,
    "tds": TDS,
    "fk_steering": FKSteering,
}


def make_sampler(method: MethodConfig, exponents: Sequence[float], controls: Sequence[str] | None = None) -> Sampler:
    """The sampler of a method's settings.

    exponents: λ of each control, in the order of the label columns. controls: their names, which tell the folders of
    classifier guidance apart; None: those are in this order. ConfigError where it has folders of other controls.
    """
    if not method.steers:
        return rollout
    options = method.given
    if method.name == "classifier_guidance":
        options |= _noised(method.noised_folders, controls)
    sampler: Sampler = SAMPLERS[method.name](exponents=tuple(exponents), **options)
    return sampler


def latents_per_image(method: MethodConfig) -> int:
    """How many latents a method holds at a time for each image."""
    return rows_per_image(make_sampler(method, ()))


def _noised(folders: Mapping[str, str], controls: Sequence[str] | None) -> dict[str, object]:
    names = tuple(folders if controls is None else controls)
    if set(names) != set(folders):
        raise ConfigError(
            f"method.noised_classifier has folders for {', '.join(folders)}, and the controls are {', '.join(names)}; expected "
            f"NAME=FOLDER of each of them, such as {NOISED_EXAMPLE}"
        )
    return {"controls": names, "noised_classifier": tuple(absolute_path(folders[name]) for name in names)}
