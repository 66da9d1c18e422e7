"""Policies on small pipelines, for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ctrl_ray.config import ControlConfig, LoraConfig, SamplerConfig
from ctrl_ray.policy.adapter import make_adapter_info, save_adapter
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import load_policy_on
from ctrl_ray.policy.controlled import ControlledPolicy


def make_policy(
    folder: str | Path, num_classes: Mapping[str, int], *, lora: LoraConfig | None, **kwargs: Any
) -> ControlledPolicy:
    """A policy on the pipeline in `folder`; lora=None: full fine-tuning."""
    backbone = load_backbone(str(folder))
    return load_policy_on(backbone, num_classes, lora=lora, full_finetune=lora is None, **kwargs)


def save_gains_adapter(folder: Path, base: Path, controls: Mapping[str, ControlConfig], *, by: float = 0.0) -> Path:
    """An adapter of label gains of two steps on the pipeline in `base`; `by`: off the pre-trained model, see `moved`."""
    lora = LoraConfig(rank=2)
    info = make_adapter_info(
        base_model=str(base),
        base_revision=None,
        controls=controls,
        sampler=SamplerConfig(num_steps=2),
        lora=lora,
        kind="gains",
        training={"kl_coef": 1.0, "precision": "fp32"},
    )
    policy = make_policy(base, info.num_classes, lora=lora, kind="gains")
    return save_adapter(folder, moved(policy, by=by, seed=0), info)


@torch.no_grad()
def moved(policy: ControlledPolicy, *, by: float, seed: int) -> ControlledPolicy:
    """Off the pre-trained model, as training would: null rows stay zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.trainable_parameters().items():
        change = by * torch.randn(parameter.shape, generator=generator)
        if "tables." in name:
            change[-1] = 0
        parameter += change
    return policy
