"""From a flow model's scheduler config to the chain of Gaussians that training and sampling share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctrl_ray.config import SamplerConfig
from ctrl_ray.diffusion.flow import FlowKernel, dynamic_shift, flow_sigmas
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.policy.flow_scheduler import AncestralFlowScheduler

_SETTINGS = (
    *("num_train_timesteps", "shift", "use_dynamic_shifting"),
    *("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift"),
)
_OTHER_SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "shift_terminal")
_BROKEN = (TypeError, ValueError, RuntimeError, LookupError, ArithmeticError)


def flow_scheduler(config: Mapping[str, Any], sampler: SamplerConfig | None = None) -> AncestralFlowScheduler:
    """Our scheduler with the shift of any flow scheduler's config; with the noise of `sampler`, else with η = 1."""
    settings = {name: config[name] for name in _SETTINGS if name in config}
    noise = {} if sampler is None else {"sde": sampler.flow_sde, "eta": sampler.eta}
    return AncestralFlowScheduler(**settings, **noise)


def check_flow_schedule(config: Mapping[str, Any], whose: str) -> None:
    """ModelError unless a scheduler's config is one of flow matching, evenly spaced and shifted. whose: 'base model X'."""
    found = config.get("_class_name")
    if "num_train_timesteps" not in config or "shift" not in config:
        raise ModelError(
            f"the scheduler of {whose} {f'is a {found}, which' if found else 'is one that'} has no shift of a flow "
            "(num_train_timesteps, shift); expected one of flow matching, such as FlowMatchEulerDiscreteScheduler"
        )
    other = [name for name in _OTHER_SPACINGS if config.get(name)]
    if other:
        raise ModelError(
            f"the scheduler of {whose} spaces its steps by {', '.join(other)}, which ctrl_ray does not know; expected evenly "
            "spaced ones with a shift"
        )
    try:
        flow_kernel(config, SamplerConfig(num_steps=2), num_tokens=1024)
    except (*_BROKEN, ConfigError) as error:
        raise ModelError(
            f"the scheduler of {whose} has settings that make no flow ({type(error).__name__}: {error}); expected those of "
            "FlowMatchEulerDiscreteScheduler"
        ) from error


def flow_kernel(config: Mapping[str, Any], sampler: SamplerConfig, *, num_tokens: int) -> FlowKernel:
    """The chain of `sampler.num_steps` steps, σ from 1 to 0; the last has no noise, and is the reference's.

    num_tokens: of the latents, for a config that shifts by them.
    """
    shift = float(config["shift"])
    if config.get("use_dynamic_shifting"):
        few = int(config.get("base_image_seq_len", 256)), float(config.get("base_shift", 0.5))
        many = int(config.get("max_image_seq_len", 4096)), float(config.get("max_shift", 1.15))
        shift = dynamic_shift(num_tokens, few=few, many=many)
    return FlowKernel(
        flow_sigmas(sampler.num_steps, shift=shift),
        sde=sampler.flow_sde,
        eta=sampler.eta,
        time_scale=float(config["num_train_timesteps"]),
        reference_steps=sampler.reference_steps,
    )
