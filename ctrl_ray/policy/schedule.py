"""From any diffusers scheduler's config to the chain of Gaussians that training and sampling share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from diffusers import DDIMScheduler

from ctrl_ray.config import SamplerConfig
from ctrl_ray.diffusion.ddim import DDIMKernel, PredictionType
from ctrl_ray.errors import ConfigError, ModelError

_BROKEN = (TypeError, ValueError, RuntimeError, NotImplementedError, LookupError, ArithmeticError)
"""What diffusers and our kernel raise for settings of another type or beyond their range."""


def ddim_scheduler(config: Mapping[str, Any]) -> DDIMScheduler:
    """DDIM with the noise schedule of any scheduler's config.

    It ends at ᾱ of the first training step, so that the last step has a density, and does not clip x_0 (clipping is no
    part of a Gaussian step).
    """
    return DDIMScheduler.from_config(dict(config), set_alpha_to_one=False, clip_sample=False, thresholding=False)


def check_schedule(config: Mapping[str, Any], whose: str) -> None:
    """ModelError unless a scheduler's config tells a schedule of betas that DDIM can be built from. whose: 'base model X'."""
    found = config.get("_class_name")
    if "num_train_timesteps" not in config or not {"beta_start", "trained_betas"} & set(config):
        raise ModelError(
            f"the scheduler of {whose} {f'is a {found}, which' if found else 'is one that'} has no noise schedule of "
            "betas (num_train_timesteps, beta_start, beta_end); expected one of DDPM's family, such as DDIMScheduler"
        )
    try:
        scheduler = ddim_scheduler(config)
        load_kernel(scheduler, SamplerConfig(num_steps=1))
        shares = scheduler.alphas_cumprod
        falls = bool((shares[1:] <= shares[:-1]).all()) and bool(shares[0] < 1) and bool(shares[-2:].min() >= 0)
        if len(shares) != config["num_train_timesteps"] or not falls or not bool((shares[:-1] > 0).all()):
            raise ValueError("its alphas_cumprod are not num_train_timesteps shares that fall from below 1 towards 0")
        if scheduler.config.prediction_type not in get_args(PredictionType):
            known = ", ".join(get_args(PredictionType))
            raise ValueError(
                f"prediction_type {scheduler.config.prediction_type!r} is unknown; expected one of {known}"
            )
    except _BROKEN as error:
        raise ModelError(
            f"the scheduler of {whose} has settings that make no noise schedule ({type(error).__name__}: {error}); expected "
            "those of one of DDPM's family, such as DDIMScheduler"
        ) from error


def load_kernel(scheduler: DDIMScheduler, sampler: SamplerConfig) -> DDIMKernel:
    """The scheduler's chain of `sampler.num_steps` steps; the last `sampler.reference_steps` are the reference's."""
    most = scheduler.config.num_train_timesteps
    if sampler.num_steps > most:
        raise ConfigError(
            f"sampler.num_steps is {sampler.num_steps}, but the model's noise schedule has {most} steps; expected 1 to {most}"
        )
    scheduler.set_timesteps(sampler.num_steps)
    return DDIMKernel(
        scheduler.alphas_cumprod,
        scheduler.timesteps.tolist(),
        final_alpha_cumprod=float(scheduler.final_alpha_cumprod),
        eta=sampler.eta,
        prediction_type=scheduler.config.prediction_type,
        num_train_timesteps=scheduler.config.num_train_timesteps,
        reference_steps=sampler.reference_steps,
    )
