"""Every class of a control as an ordinary LoRA file, for people who have diffusers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ctrl_ray.config import ControlConfig, SamplerConfig
from ctrl_ray.policy.control.gains import GAINS, LabelGains
from ctrl_ray.policy.controlled import ControlledPolicy

CLASSES_FOLDER = "classes"


def class_file(control: str, label: int) -> str:
    """File name of a class within `CLASSES_FOLDER`; several controls are several files, loaded together."""
    return f"{control}={label}.safetensors"


@torch.no_grad()
def save_class_loras(folder: Path, policy: ControlledPolicy, controls: Mapping[str, ControlConfig]) -> None:
    """Write `folder`/classes/NAME=LABEL.safetensors for each class of each control, in diffusers' own format.

    Each is B diag(scale · g[label]) A of every layer, alpha folded in: its weight in a pipeline is 1, and less turns the
    class down. It is for policies of kind 'gains' whose parameters are whole.
    """
    for name, control in controls.items():
        for label in range(control.num_classes):
            layers = class_lora(policy, name, label)
            policy.backbone.pipeline_class.save_lora_weights(
                folder / CLASSES_FOLDER,
                **{f"{policy.backbone.denoiser}_lora_layers": layers},
                weight_name=class_file(name, label),
            )


def class_lora(policy: ControlledPolicy, control: str, label: int) -> dict[str, Tensor]:
    """A class's LoRA by names that peft knows, `LAYER.lora_A.weight` (rank, in, ...) and `LAYER.lora_B.weight` (out, rank)."""
    assert policy.lora is not None
    scale = policy.lora.alpha / policy.lora.rank
    state: dict[str, Tensor] = {}
    for name, gains in policy.denoiser.named_modules():
        if not isinstance(gains, LabelGains):
            continue
        layer = name.removesuffix(f".{GAINS}")
        down, up = gains.down[control], gains.up[control] * (scale * gains.table(control).weight[label])
        state[f"{layer}.lora_A.weight"] = down.detach().cpu().contiguous()
        # of a convolution, B is one of 1 by 1
        state[f"{layer}.lora_B.weight"] = up.reshape(*up.shape, *[1] * (down.dim() - 2)).detach().cpu().contiguous()
    return state


def write_usage(
    file: Path, policy: ControlledPolicy, base_model: str, controls: Mapping[str, ControlConfig], sampler: SamplerConfig
) -> None:
    """Write, as Markdown, how plain diffusers draws with the files of the classes, where that is what was trained and where
    it is not."""
    first = next(iter(controls))
    scheduler, of_call = policy.backbone.usage_scheduler(sampler)
    lines = [
        "# Classes for plain diffusers",
        "",
        f"Each file in `{CLASSES_FOLDER}/` is one class of a control as an ordinary LoRA: "
        + "; ".join(
            f"`{class_file(name, label)}` is {name} {class_name!r}"
            for name, control in controls.items()
            for label, class_name in enumerate(control.class_names)
        )
        + ". Its weight is 1; less turns the class down.",
        "",
        "```python",
        "import json",
        *policy.backbone.usage_imports,
        f"from diffusers import {policy.backbone.pipeline_class.__name__}",
        "",
        f'pipe = {policy.backbone.pipeline_class.__name__}.from_pretrained("{base_model}"{policy.backbone.loading_options})',
        "pipe.scheduler = " + scheduler.replace("SCHEDULER", 'json.load(open("adapter.json"))["scheduler"]'),
        f'pipe.load_lora_weights("{CLASSES_FOLDER}", weight_name="{class_file(first, 0)}")',
    ]
    if sampler.reference_steps:
        lines += ["", *_switch_off_lines(sampler), ""]
    options = "".join(f", {name}={value}" for name, value in sampler.call_options().items())
    callback = ", callback_on_step_end=pre_trained_at_last" if sampler.reference_steps else ""
    lines += [
        f'image = pipe("PROMPT", num_inference_steps={sampler.num_steps}, {of_call}'
        f"guidance_scale={sampler.guidance_scale:g}{options}{callback}).images[0]",
        "```",
        "",
    ]
    if sampler.reference_steps:
        steps = "step" if sampler.reference_steps == 1 else f"{sampler.reference_steps} steps"
        lines += [
            f"The three lines switch the LoRA off for the last {steps}, which the pre-trained model took in training. "
            "`pipe.enable_lora()` before the next image switches it on.",
            "",
        ]
    if len(controls) > 1:
        lines += [
            "Several controls are several files: load each with an `adapter_name` of its own, then `pipe.set_adapters([...])`.",
            "",
        ]
    if sampler.guidance_scale != 1.0:
        branch = {
            "class": "The unconditional branch was trained with the class, which is what a stock pipeline does.",
            "pre_trained": "The unconditional branch was trained as the pre-trained model's (`sampler.null_branch` "
            "pre_trained), but a stock pipeline gives it the class too, so these images are not those of the training; "
            "train with `--sampler.null-branch class` for images that are.",
        }
        lines += [branch[sampler.null_branch], ""]
    file.write_text("\n".join(lines), encoding="utf-8")


def _switch_off_lines(sampler: SamplerConfig) -> list[str]:
    """The three lines that leave a stock pipeline's last `reference_steps` to the pre-trained model."""
    return [
        "def pre_trained_at_last(pipe, step, time, tensors):",
        f"    pipe.disable_lora() if step == {sampler.num_steps - sampler.reference_steps - 1} else None",
        "    return tensors",
    ]
