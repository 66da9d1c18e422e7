"""What a run takes from a diffusers pipeline: the denoiser, the encoded prompts, and the step kernel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ctrl_ray.diffusion.ddim import DDIMKernel
from ctrl_ray.errors import ModelError
from ctrl_ray.policy.base_model import resolve_base_model
from ctrl_ray.policy.protocol import Condition


class PromptEncoder:
    """Text features of prompts, computed once per prompt; the text encoder is frozen and float32."""

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, device: torch.device | str) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder.eval().requires_grad_(False)
        self._device = torch.device(device)
        self._cache: dict[str, Tensor] = {}

    @torch.no_grad()
    def _features(self, prompt: str) -> Tensor:
        if prompt not in self._cache:
            tokens = self._tokenizer(
                prompt,
                padding="max_length",
                max_length=self._tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            device = next(self._text_encoder.parameters()).device
            self._cache[prompt] = self._text_encoder(tokens.input_ids.to(device))[0][0].to(self._device)
        return self._cache[prompt]

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Condition with 'text' (B, L, D) and 'null_text' (B, L, D), the features of the empty prompt."""
        text = torch.stack([self._features(prompt) for prompt in prompts])
        return Condition(tuple(prompts), {"text": text, "null_text": self._features("").expand_as(text)})


def load_prompt_encoder(
    base_model: str, revision: str | None = None, *, device: str | torch.device = "cpu"
) -> PromptEncoder:
    """Tokenizer and text encoder of a Stable-Diffusion-format pipeline."""
    folder = _checked_folder(base_model, revision)
    tokenizer = CLIPTokenizer.from_pretrained(folder, subfolder="tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(
        folder, subfolder="text_encoder", dtype=torch.float32, use_safetensors=True
    )
    return PromptEncoder(tokenizer, text_encoder.to(device), device)


def load_unet(
    base_model: str, revision: str | None = None, *, dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """The frozen denoiser of a Stable-Diffusion-format pipeline, in eval mode."""
    folder = _checked_folder(base_model, revision)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=dtype, use_safetensors=True)
    return unet.eval().requires_grad_(False)


def empty_unet(
    base_model: str, revision: str | None = None, *, dtype: torch.dtype = torch.float32
) -> UNet2DConditionModel:
    """The same denoiser from its configuration alone, on torch's meta device: shapes and types without memory."""
    folder = _checked_folder(base_model, revision)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
    torch.nn.Module.to(unet, dtype)  # diffusers' own warns of submodules to keep in float32, also where there is none
    return unet.eval().requires_grad_(False)


def load_scheduler(base_model: str, revision: str | None = None) -> DDIMScheduler:
    """DDIM with the pipeline's noise schedule, ending at ᾱ of the first training step so that the last step has a
    density, and with no clipping of x_0 (clipping is no part of the Gaussian step)."""
    folder = _checked_folder(base_model, revision)
    config = json.loads((Path(folder) / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    return ddim_scheduler(config)


def ddim_scheduler(config: dict[str, Any]) -> DDIMScheduler:
    """The DDIM scheduler that training and sampling share, from any scheduler's config."""
    return DDIMScheduler.from_config(config, set_alpha_to_one=False, clip_sample=False, thresholding=False)


def make_kernel(scheduler: DDIMScheduler, num_steps: int, eta: float, reference_steps: int = 0) -> DDIMKernel:
    """The scheduler's chain of `num_steps` steps as Gaussians; the last `reference_steps` belong to the reference."""
    scheduler.set_timesteps(num_steps)
    return DDIMKernel(
        scheduler.alphas_cumprod,
        scheduler.timesteps.tolist(),
        final_alpha_cumprod=float(scheduler.final_alpha_cumprod),
        eta=eta,
        prediction_type=scheduler.config.prediction_type,
        num_train_timesteps=scheduler.config.num_train_timesteps,
        reference_steps=reference_steps,
    )


def _checked_folder(base_model: str, revision: str | None) -> str:
    folder = resolve_base_model(base_model, revision)
    index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    if "unet" not in index or index["unet"][1] != "UNet2DConditionModel":
        raise ModelError(
            f"base model {base_model!r} is a {index.get('_class_name')} without a UNet2DConditionModel; expected a "
            "Stable-Diffusion-format pipeline (text encoder, VAE, conditional UNet)"
        )
    return folder
