"""Stable Diffusion XL: a conditional UNet that is told sizes, two CLIP text encoders, a VAE."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_ray.config import SamplerConfig
from ctrl_ray.errors import ModelError
from ctrl_ray.policy.backbones.base import DiffusersBackbone
from ctrl_ray.policy.backbones.stable_diffusion import StableDiffusion
from ctrl_ray.policy.backbones.text import TOKENIZER_OF, Features, TextEncoder, load_text_parts, with_pooled
from ctrl_ray.policy.pipeline_files import check_tokenizer, read_json

_ENCODERS = ("text_encoder", "text_encoder_2")


class StableDiffusionXL(StableDiffusion):
    """A pipeline of `StableDiffusionXLPipeline`'s components; see `Backbone` for what each member is.

    A condition has 'text', the last but one hidden states of both encoders side by side, and 'pooled', what the second one
    projects. The UNet is told that the image had the size that is drawn, and was not cropped.
    """

    frozen_parts = (*_ENCODERS, "vae")
    loading_options = ""

    def __init__(self, folder: str, sampler: SamplerConfig | None = None) -> None:
        super().__init__(folder, sampler)
        self._ids: dict[tuple[Any, ...], Tensor] = {}

    @property
    def pipeline_class(self) -> Any:
        """`StableDiffusionXLPipeline`."""
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline

    def check(self) -> None:
        """See `Backbone`: a base model's UNet, and parts of one model."""
        DiffusersBackbone.check(self)
        config = self.component_config(self.denoiser)
        channels, added = (config.get("in_channels"), config.get("out_channels")), config.get("addition_embed_type")
        added_width, size_width = (
            int(config.get(name) or 0) for name in ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
        )
        encoders = [self.component_config(name) for name in _ENCODERS]
        if channels[0] != channels[1] or added != "text_time":
            odd = f"{channels[0]} channels in and {channels[1]} out, addition_embed_type {added!r}"
            raise ModelError(
                f"the unet of base model {self.folder} has {odd}, as one for inpainting, editing or of another family; "
                "expected the UNet of a text-to-image Stable Diffusion XL"
            )
        widths = config.get("cross_attention_dim"), sum(int(encoder.get("hidden_size", 0)) for encoder in encoders)
        pooled = int(encoders[1].get("projection_dim") or 0)
        if widths[0] != widths[1] or added_width != 6 * size_width + pooled:
            raise ModelError(
                f"base model {self.folder} is made of several models, or is a refiner: its unet takes text of width "
                f"{widths[0]} and {added_width} numbers of pooled text and sizes, its text encoders give {widths[1]} and "
                f"{pooled}, with six sizes of {size_width}; expected the parts of one Stable Diffusion XL base model"
            )
        for encoder in _ENCODERS:
            check_tokenizer(Path(self.folder) / TOKENIZER_OF[encoder])

    def load_encoder(self, device: str | torch.device = "cpu") -> _TwoTextEncoders:
        """Both tokenizers and CLIP text encoders."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        models = (CLIPTextModel, CLIPTextModelWithProjection)
        classes = {name: (model, CLIPTokenizer) for name, model in zip(_ENCODERS, models, strict=True)}
        parts = load_text_parts(self.folder, classes)
        index = read_json(Path(self.folder) / "model_index.json", "its list of parts")
        return _TwoTextEncoders(parts, device, zero_null=bool(index.get("force_zeros_for_empty_prompt", True)))

    def load_pipeline(self, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
        """See `Backbone`; images get no watermark."""
        return DiffusersBackbone.load_pipeline(self, dtype, add_watermarker=False, **parts)

    def embedded(self, prompt_embeds: Tensor, pooled: Tensor | None = None) -> dict[str, Tensor]:
        """'text' and 'pooled': as they are; ConfigError without the pooled ones."""
        return with_pooled("Stable Diffusion XL", prompt_embeds, pooled)

    def condition_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """'text': (B, tokens, both widths); 'pooled': (B, width)."""
        first, second = (self.component_config(name) for name in _ENCODERS)
        width = int(first["hidden_size"]) + int(second["hidden_size"])
        return {
            "text": (batch_size, int(first["max_position_embeddings"]), width),
            "pooled": (batch_size, int(second["projection_dim"])),
        }

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """ε or v, as the scheduler's prediction type says."""
        unet: Any = denoiser
        dtype = next(denoiser.parameters()).dtype
        output: Tensor = unet(
            latents.to(dtype),
            time.to(latents.device),
            encoder_hidden_states=tensors["text"].to(dtype),
            added_cond_kwargs={
                "text_embeds": tensors["pooled"].to(dtype),
                "time_ids": self._time_ids(latents).to(dtype).expand(len(latents), -1),
            },
        ).sample
        return output

    def _time_ids(self, latents: Tensor) -> Tensor:
        """(1, 6): original size, crop, target size, (height, width) each in pixels; made once for each size and device."""
        key = (*latents.shape[-2:], str(latents.device))
        if key not in self._ids:
            size = [side * self.pixels_per_latent() for side in latents.shape[-2:]]
            self._ids[key] = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32, device=latents.device)
        return self._ids[key]


class _TwoTextEncoders(TextEncoder):
    """'text' (tokens, both widths) and 'pooled' (width,)."""

    def __init__(self, parts: Mapping[str, Any], device: str | torch.device, *, zero_null: bool) -> None:
        """zero_null: whether the unconditional branch has zeros in the place of the empty prompt."""
        super().__init__(parts, device)
        self._zero_null = zero_null

    def features(self, prompt: str) -> Features:
        """See `TextEncoder`."""
        hidden: list[Tensor] = []
        pooled: Tensor | None = None
        for encoder in _ENCODERS:
            of_encoder, pooled = self.of_clip(encoder, prompt)
            hidden.append(of_encoder)
        assert pooled is not None
        return {"text": torch.cat(hidden, dim=-1), "pooled": pooled}

    def null_features(self) -> Features:
        """Zeros, or the empty prompt's."""
        features = super().null_features()
        return {name: torch.zeros_like(tensor) for name, tensor in features.items()} if self._zero_null else features
