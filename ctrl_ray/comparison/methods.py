"""Every method that can be compared, by its name: one entry says how it draws, what is chosen, and what it costs.

A new method is one entry of METHODS. What samples alone needs a setting for each value of its knob; what is trained also
needs the configuration of its run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ctrl_ray.config import EstimatorConfig, TrainConfig
from ctrl_ray.config.method import MethodConfig
from ctrl_ray.config.presets import as_cfg

_BACKWARD, _DECODE, _DECODE_GRADIENT = 2.0, 3.4, 5.9
"""Forwards of the denoiser that a backward, a decode with its classification, and one with its gradient take on `shapes`: for
the order of the work and for what counts as dear. The report's costs are measured."""
NOMINAL_TRIES = 12.0
"""Samples that rejection takes for an image: nobody knows before they are drawn."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a method draws with one value of its knob."""

    method: MethodConfig = field(default_factory=MethodConfig)
    """The sampler; 'plain' with an adapter is the trained policy."""
    adapter_scale: float = 1.0
    """Scales the adapter's LoRA and embeddings."""
    control_scale: float | None = None
    """Guidance scale of the label alone; None: as the preset has it."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One line of the comparison."""

    title: str
    """As figures and tables show it."""
    setting: Callable[..., Setting]
    """Of a knob's value; with `noised` also of NAME=FOLDER of each control's noised classifier."""
    cost: Callable[[float, int], float]
    """(value, denoising steps) to the nominal cost of an image, in plain samples."""
    knob: str | None = None
    """What is chosen on the validation images; None: nothing."""
    values: tuple[float, ...] = (1.0,)
    """The knob's, as many as every other method has."""
    training: Callable[[TrainConfig], TrainConfig] | None = None
    """The run that trains it, from the preset's; None: nothing is trained."""
    noised: bool = False
    """Whether it needs classifiers of noised latents, which are fitted once."""

    def at(self, value: float, noised: tuple[str, ...]) -> Setting:
        """The setting of a knob's value. noised: NAME=FOLDER of each control's noised classifier, for what needs them."""
        found: Setting = self.setting(value, noised) if self.noised else self.setting(value)
        return found


def _sampler(name: str, **options: Any) -> Callable[[float], Setting]:
    """Settings of a sampler; options: those of MethodConfig, the type's name where the knob's value stands, else a number."""

    def setting(value: float) -> Setting:
        kinds = {"int": int(value), "float": float(value)}
        given: dict[str, Any] = {option: kinds.get(each, each) for option, each in options.items()}
        return Setting(method=MethodConfig(name=name, **given))  # type: ignore[arg-type]

    return setting


def _steered(forwards: float, backwards: float, decodes: float, gradients: float) -> Callable[[float, int], float]:
    """Cost of a sampler that does so much at each step, whatever its knob."""
    each = forwards + backwards * _BACKWARD + decodes * _DECODE + gradients * _DECODE_GRADIENT
    return lambda value, num_steps: each


def _particles(each: float) -> Callable[[float, int], float]:
    """Cost of N paths, of so much a step."""
    return lambda value, num_steps: value * each


def _whole_samples(tries: Callable[[float], float]) -> Callable[[float, int], float]:
    """Cost of whole samples, each judged once."""
    return lambda value, num_steps: tries(value) * (1 + _DECODE / num_steps)


def _fk_cost(value: float, num_steps: int) -> float:
    """One potential at every fifth step but the first, and the last one."""
    return value * (1 + _DECODE * (-(-num_steps // 5)) / num_steps)


def ctrl_run(config: TrainConfig) -> TrainConfig:
    """The preset's own run."""
    return config


def draft_run(config: TrainConfig) -> TrainConfig:
    """DRaFT-1: the reward's gradient through the last trained step, no KL and no bound on the drift (Clark et al. 2024).

    The steps that the pre-trained model takes at the end are gone back through besides: nothing in them is trained.
    """
    estimator = EstimatorConfig(name="last_k", steps=1 + config.sampler.reference_steps)
    return dataclasses.replace(config, kl_coef=0.0, target_kl=None, estimator=estimator)


def _by_noised(value: float, noised: tuple[str, ...]) -> Setting:
    return Setting(method=MethodConfig(name="classifier_guidance", scale=value, noised_classifier=noised))


def _scaled(value: float) -> Setting:
    return Setting(adapter_scale=value)


_COUNTS = (4.0, 8.0, 2.0)
_TWISTED = 4
"""Particles of TDS. What is chosen is the scale of its twist: at the nominal 1 more particles did not mend the images."""
_SCALES = (0.1, 0.3, 0.03)
"""Of gradients of ℓ = Σ λ log p̂(x̂_0), which a sharp classifier makes long: the nominal 1 breaks the images of `shapes`."""
_ADAPTER_SCALES = (1.0, 0.9, 1.1)
_PLAIN_COST = _steered(1, 0, 0, 0)

PLAIN = "plain"
METHODS: dict[str, Method] = {
    PLAIN: Method(title="pre-trained", setting=lambda value: Setting(), cost=_PLAIN_COST),
    "ctrl": Method(
        title="CTRL",
        knob="adapter_scale",
        values=_ADAPTER_SCALES,
        setting=_scaled,
        cost=_PLAIN_COST,
        training=ctrl_run,
    ),
    "draft": Method(
        title="DRaFT-1",
        knob="adapter_scale",
        values=(1.0, 0.5, 0.75),
        setting=_scaled,
        cost=_PLAIN_COST,
        training=draft_run,
    ),
    "cfg": Method(
        title="CFG fine-tuning",
        knob="control_scale",
        values=(1.0, 2.0, 4.0),
        setting=lambda value: Setting(control_scale=value),
        cost=_steered(2, 0, 0, 0),
        training=as_cfg,
    ),
    "classifier_guidance": Method(
        title="classifier guidance",
        knob="scale",
        values=(0.5, 1.0, 2.0),
        setting=_by_noised,
        cost=_steered(1.2, 0, 0, 0),
        noised=True,
    ),
    "best_of_n": Method(
        title="best of N",
        knob="num_particles",
        values=_COUNTS,
        setting=_sampler("best_of_n", num_particles="int"),
        cost=_whole_samples(lambda value: value),
    ),
    "rejection": Method(
        title="rejection", setting=_sampler("rejection"), cost=_whole_samples(lambda value: NOMINAL_TRIES)
    ),
    "mpgd": Method(
        title="MPGD",
        knob="scale",
        values=_SCALES,
        setting=_sampler("mpgd", scale="float"),
        cost=_steered(1, 0, 0, 1),
    ),
    "dps": Method(
        title="DPS",
        knob="scale",
        values=_SCALES,
        setting=_sampler("dps", scale="float"),
        cost=_steered(1, 1, 0, 1),
    ),
    "fk_steering": Method(
        title="FK steering",
        knob="num_particles",
        values=_COUNTS,
        setting=_sampler("fk_steering", num_particles="int"),
        cost=_fk_cost,
    ),
    "smc": Method(
        title="SMC",
        knob="num_particles",
        values=_COUNTS,
        setting=_sampler("smc", num_particles="int"),
        cost=_particles(1 + _DECODE),
    ),
    "svdd": Method(
        title="SVDD",
        knob="num_particles",
        values=_COUNTS,
        setting=_sampler("svdd", num_particles="int"),
        cost=_particles(1 + _DECODE),
    ),
    "tfg": Method(
        title="TFG",
        knob="scale and mean_scale",
        values=_SCALES,
        setting=_sampler("tfg", scale="float", mean_scale="float"),
        cost=_steered(1, 1, 0, 16),
    ),
    "tds": Method(
        title="TDS",
        knob="scale",
        values=_SCALES,
        setting=_sampler("tds", num_particles=_TWISTED, scale="float"),
        cost=_steered(_TWISTED, _TWISTED, 0, _TWISTED),
    ),
}
"""Name to method, the cheap ones first."""

ADAPTER = Method(title="adapter", knob="adapter_scale", values=_ADAPTER_SCALES, setting=_scaled, cost=_PLAIN_COST)
"""An adapter that is given under a name of its own."""
