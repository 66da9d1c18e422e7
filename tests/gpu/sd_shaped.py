"""Stable Diffusion 1.5's denoiser in shape, with random weights made on the device: nothing is downloaded or read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctrl_ray.config import ControlConfig, EvaluationConfig, LoraConfig, SamplerConfig, ScalingConfig, TrainConfig
from ctrl_ray.diffusion.steps import DenoisingKernel, Guidance
from ctrl_ray.gradients.adjoint import MicroBatch
from ctrl_ray.gradients.rollout import Trajectory
from ctrl_ray.policy import build
from ctrl_ray.policy.backbones.stable_diffusion import StableDiffusion
from ctrl_ray.policy.build import build_policy
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Condition, Inputs
from tests.hollow import make_hollow

CONTROLS = {"size": ControlConfig(classes=("a", "b", "c", "d"))}
_WHOLE = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
"""diffusers' defaults are Stable Diffusion's but for these: latents of 512 px, CLIP's width."""
_TINY = {"sample_size": 8, "cross_attention_dim": 32, "attention_head_dim": 2, "norm_num_groups": 4} | {
    "block_out_channels": (8, 16, 16, 16)
}
_SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "clip_sample": False,
}


def write_sd_shaped(folder: Path, *, tiny: bool) -> Path:
    """Configurations of a pipeline without weights; `tiny`: as many layers, each of a few channels."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**(_TINY if tiny else _WHOLE))  # type: ignore[arg-type]
    unet.save_config(folder / "unet")
    contents = {
        "model_index.json": {"_class_name": "StableDiffusionPipeline"},
        "scheduler/scheduler_config.json": _SCHEDULER,
        "text_encoder/config.json": {"max_position_embeddings": 77, "hidden_size": unet.config.cross_attention_dim},
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    make_hollow(folder)
    return folder


def sd_config(folder: Path, precision: Any, micro_batch: int, *, checkpointing: bool) -> TrainConfig:
    """What the preset for Stable Diffusion trains: 50 steps, guidance 7.5, LoRA of rank 16 on the attention layers."""
    return TrainConfig(
        base_model=str(folder),
        controls=CONTROLS,
        global_batch_size=micro_batch,
        micro_batch_size_per_worker=micro_batch,
        sampler=SamplerConfig(num_steps=50, guidance_scale=7.5, reference_steps=1),
        lora=LoraConfig(rank=16, alpha=16.0),
        scaling=ScalingConfig(use_gpu=True, zero_stage=0, precision=precision, gradient_checkpointing=checkpointing),
        evaluation=EvaluationConfig(batch_size=1),
    )


class _Random(StableDiffusion):
    """Random weights in the place of those of a file."""

    device = torch.device("cpu")

    def load_denoiser(self, dtype: torch.dtype = torch.float32, *, empty: bool = False) -> nn.Module:
        """Made on the device, in its type."""
        from diffusers import UNet2DConditionModel

        if empty:
            return super().load_denoiser(dtype, empty=True)
        with torch.device(self.device):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(self.folder, subfolder="unet"))
        nn.Module.to(unet, dtype)
        return unet.eval().requires_grad_(False)


def random_policy(config: TrainConfig, device: torch.device) -> ControlledPolicy:
    """`build_policy` with random weights, on the device."""

    def load(folder: str, revision: str | None = None) -> _Random:
        backbone = _Random(folder)
        backbone.device = device
        return backbone

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "load_backbone", load)
        return build_policy(config).to(device)


def random_micro_batch(
    policy: ControlledPolicy, config: TrainConfig, device: torch.device
) -> tuple[MicroBatch, DenoisingKernel]:
    """A micro-batch of random latents and prompts at the start of its adjoint pass; there are latents of two steps."""
    size, kernel = config.micro_batch_size_per_worker, policy.backbone.make_kernel(config.sampler)

    def features() -> dict[str, Tensor]:
        shapes = policy.backbone.condition_shapes(size)
        return {name: torch.randn(shape, device=device) for name, shape in shapes.items()}

    condition = Condition(("",) * size, features(), features())
    labels = torch.zeros(size, 1, dtype=torch.long, device=device)
    latents = torch.randn(2, size, *policy.latent_shape, device=device)
    batch = MicroBatch(
        policy,
        kernel,
        Trajectory(latents, Inputs(condition, labels, Guidance.of(config.sampler))),
        kl_coef=1.0,
        sample_weights=torch.full((size,), 1 / size, device=device),
        backward=Tensor.backward,
    )
    return batch, kernel
