"""From a config to the policy: the backbone in its precision, LoRA or the whole denoiser, an adapter to go on from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch

from ctrl_ray.config import AdapterKind, ControlConfig, LoraConfig, Precision, TrainConfig
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.adapter import check_base_model, check_fits, load_into_policy
from ctrl_ray.policy.adapter_info import AdapterInfo, read_adapter_info
from ctrl_ray.policy.adapter_tensors import adapter_tensors
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.backbones.base import Backbone
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.precision import frozen_dtype


def policy_controls(config: TrainConfig) -> dict[str, ControlConfig]:
    """Controls in label-column order: the config's, then those that only the initial adapter has (always null here)."""
    controls = dict(config.controls)
    if config.init_adapter:
        info = read_adapter_info(config.init_adapter)
        if info.lora is not None and not config.full_finetune and info.kind != config.adapter.kind:
            raise ConfigError(
                f"adapter.kind is {config.adapter.kind!r}, but the adapter {config.init_adapter} is of kind "
                f"{info.kind!r}; go on with --adapter.kind {info.kind}"
            )
        for name, control in info.controls.items():
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
    """
    backbone = load_backbone(config.base_model, config.base_revision, config.sampler)
    policy = load_policy_on(
        backbone,
        {name: control.num_classes for name, control in (controls or policy_controls(config)).items()},
        lora=None if config.full_finetune else config.lora,
        kind=config.adapter.kind,
        full_finetune=config.full_finetune,
        precision=config.scaling.precision,
        seed=config.seed,
        empty=empty,
    )
    if config.init_adapter and not empty:
        check_base_model(read_adapter_info(config.init_adapter), backbone)
        load_into_policy(config.init_adapter, policy)
    if config.scaling.fixed_gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    if config.scaling.compile and not empty:
        policy.compile_blocks()
    return policy


def load_policy_on(
    backbone: Backbone,
    num_classes: Mapping[str, int],
    *,
    lora: LoraConfig | None,
    kind: AdapterKind = "embedding",
    full_finetune: bool = False,
    precision: Precision = "fp32",
    seed: int = 0,
    empty: bool = False,
) -> ControlledPolicy:
    """A policy around the backbone's pre-trained denoiser (see `ControlledPolicy`), its weights in the types that the
    precision asks for: 16 bits for a frozen denoiser in bf16 and fp16; float32, under autocast, for one that is trained."""
    denoiser = backbone.load_denoiser(torch.float32 if full_finetune else frozen_dtype(precision), empty=empty)
    with torch.device("meta") if empty else nullcontext():
        return ControlledPolicy(
            backbone,
            denoiser,
            num_classes,
            lora=lora,
            kind=kind,
            full_finetune=full_finetune,
            precision=precision,
            seed=seed,
        )


def load_adapted_policy(
    folder: str | Path, info: AdapterInfo, backbone: Backbone, num_classes: Mapping[str, int], precision: Precision
) -> ControlledPolicy:
    """The policy of an adapter, whose `info` has been read and whose controls are among `num_classes`."""
    policy = load_policy_on(
        backbone,
        num_classes,
        lora=info.lora,
        kind=info.kind,
        full_finetune=info.lora is None,
        precision=precision,
    )
    load_into_policy(folder, policy)
    return policy


def check_adapter(folder: str | Path, info: AdapterInfo) -> str | None:
    """Before anything is started with an adapter: ModelError where it is damaged or was trained on another denoiser; the
    warning of `check_base_model`. Its files are read, the base model's weights are not."""
    backbone = load_backbone(info.base_model, info.base_revision, info.sampler)
    warning = check_base_model(info, backbone)
    counts, whole = info.num_classes, info.lora is None
    policy = load_policy_on(backbone, counts, lora=info.lora, kind=info.kind, full_finetune=whole, empty=True)
    _check_tensors(folder, info, policy)
    return warning


def check_init_adapter(config: TrainConfig, controls: Mapping[str, ControlConfig], backbone: Backbone) -> str | None:
    """`check_adapter` of a run's `init_adapter`, against the policy that the run is to train; nothing where it has none."""
    if not config.init_adapter:
        return None
    info = read_adapter_info(config.init_adapter)
    warning = check_base_model(info, backbone)
    _check_tensors(config.init_adapter, info, build_policy(config, controls, empty=True))
    return warning


def _check_tensors(folder: str | Path, info: AdapterInfo, policy: ControlledPolicy) -> None:
    check_fits(folder, info, policy)
    for _ in adapter_tensors(folder, info, policy):
        pass
