"""Every class of a control as an ordinary LoRA file, for people who have diffusers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ctrl_ray.config import ControlConfig
from ctrl_ray.policy.control.gains import GAINS, label_gains
from ctrl_ray.policy.controlled import ControlledPolicy

CLASSES_FOLDER = "classes"


def class_file(control: str, label: int) -> str:
    """File name of a class within `CLASSES_FOLDER`; several controls are several files, loaded together."""
    return f"{control}={label}.safetensors"


@torch.no_grad()
def save_class_loras(folder: Path, policy: ControlledPolicy, controls: Mapping[str, ControlConfig]) -> list[Path]:
    """Write `folder`/classes/NAME=LABEL.safetensors for each class of each control, in diffusers' own format.

    Each is B diag(scale · g[label]) A of every layer, alpha folded in: its weight in a pipeline is 1, and less turns the
    class down. It is for policies of kind 'gains' whose parameters are whole.
    """
    written = []
    for name, control in controls.items():
        for label in range(control.num_classes):
            layers = class_lora(policy, name, label)
            policy.backbone.pipeline_class.save_lora_weights(
                folder / CLASSES_FOLDER,
                **{f"{policy.backbone.denoiser}_lora_layers": layers},
                weight_name=class_file(name, label),
            )
            written.append(folder / CLASSES_FOLDER / class_file(name, label))
    return written


def class_lora(policy: ControlledPolicy, control: str, label: int) -> dict[str, Tensor]:
    """A class's LoRA by names that peft knows, `LAYER.lora_A.weight` (rank, in, ...) and `LAYER.lora_B.weight` (out, rank)."""
    assert policy.lora is not None
    scale = policy.lora.alpha / policy.lora.rank
    state: dict[str, Tensor] = {}
    for layer, module in policy.denoiser.named_modules():
        if GAINS not in dict(module.named_children()):
            continue
        gains = label_gains(module)
        down, up = gains.down[control], gains.up[control] * (scale * gains.table(control).weight[label])
        state[f"{layer}.lora_A.weight"] = down.detach().cpu().contiguous()
        # of a convolution, B is one of 1 by 1
        state[f"{layer}.lora_B.weight"] = up.reshape(*up.shape, *[1] * (down.dim() - 2)).detach().cpu().contiguous()
    return state
