"""From a config to the policy: the backbone in its precision, LoRA or the whole denoiser, an adapter to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext

import torch

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.adapter import check_base_model, load_into_policy, read_adapter_info
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.controlled import ControlledPolicy


def policy_controls(config: TrainConfig) -> dict[str, ControlConfig]:
    """Controls in label-column order: the config's, then those that only the initial adapter has (always null here)."""
    controls = dict(config.controls)
    if config.init_adapter:
        for name, control in read_adapter_info(config.init_adapter).controls.items():
            if name in controls and controls[name].num_classes != control.num_classes:
                raise ConfigError(
                    f"control {name!r} has {controls[name].num_classes} classes in the config but "
                    f"{control.num_classes} in the adapter {config.init_adapter}"
                )
            controls.setdefault(name, control)
    return controls


def build_policy(
    config: TrainConfig, controls: Mapping[str, ControlConfig] | None = None, *, empty: bool = False
) -> ControlledPolicy:
    """The policy of a run before its first update; equal to the reference unless `init_adapter` is set.

    empty: all of it on torch's meta device, for counting; no weights are read.

    bf16 keeps a frozen backbone in bfloat16 under float32 LoRA and tables; with full fine-tuning the denoiser's weights
    stay float32 and run under bfloat16 autocast.
    """
    bf16 = config.scaling.precision == "bf16"
    frozen = not config.full_finetune
    dtype = torch.bfloat16 if bf16 and frozen else torch.float32
    backbone = load_backbone(config.base_model, config.base_revision)
    denoiser = backbone.load_denoiser(dtype, empty=empty)
    with torch.device("meta") if empty else nullcontext():
        policy = ControlledPolicy(
            backbone,
            denoiser,
            {name: control.num_classes for name, control in (controls or policy_controls(config)).items()},
            lora=config.lora if frozen else None,
            full_finetune=config.full_finetune,
            autocast_dtype=torch.bfloat16 if bf16 and not frozen else None,
            seed=config.seed,
        )
    if config.init_adapter and not empty:
        check_base_model(read_adapter_info(config.init_adapter), backbone)
        load_into_policy(config.init_adapter, policy)
    if config.scaling.fixed_gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    return policy
