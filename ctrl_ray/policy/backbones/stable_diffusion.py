"""Stable Diffusion 1.x and 2.x: a conditional UNet, one CLIP text encoder, a VAE.

diffusers' and transformers' classes are imported where they are used: a reward actor loads the VAE alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.policy.backbones.base import DiffusersBackbone, Row
from ctrl_ray.policy.backbones.text import Features, TextEncoder, load_text_parts
from ctrl_ray.policy.pipeline_files import check_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


class StableDiffusion(DiffusersBackbone):
    """A pipeline of `StableDiffusionPipeline`'s components; see `Backbone` for what each member is."""

    denoiser = "unet"
    frozen_parts: ClassVar[tuple[str, ...]] = ("text_encoder", "vae")
    loading_options = ", safety_checker=None"

    @property
    def pipeline_class(self) -> Any:
        """`StableDiffusionPipeline`."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline

    @property
    def denoiser_class(self) -> Any:
        """`UNet2DConditionModel`."""
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        config = self.component_config(self.denoiser)
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return (config["in_channels"], height, width)

    def check(self) -> None:
        """Also: the UNet takes latents and text alone (SDXL's takes sizes too, an inpainting model's a mask)."""
        super().check()
        config = self.component_config(self.denoiser)
        channels, more = (config.get("in_channels"), config.get("out_channels")), config.get("addition_embed_type")
        if channels[0] != channels[1] or more is not None:
            odd = (
                f"addition_embed_type {more!r}"
                if more is not None
                else f"{channels[0]} channels in and {channels[1]} out"
            )
            raise ModelError(
                f"the unet of base model {self.folder} has {odd}, as one for inpainting, editing or of SDXL; expected the "
                "UNet of a text-to-image Stable Diffusion 1.x or 2.x"
            )
        widths = config.get("cross_attention_dim"), self.component_config("text_encoder").get("hidden_size")
        if all(isinstance(width, int) for width in widths) and widths[0] != widths[1]:
            raise ModelError(
                f"base model {self.folder} is made of two models: its unet takes text of width {widths[0]}, its text_encoder "
                f"gives {widths[1]}; expected the parts of one"
            )
        check_tokenizer(Path(self.folder) / "tokenizer")

    def load_tokenizer(self) -> CLIPTokenizer:
        """CLIP's."""
        from transformers import CLIPTokenizer

        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(self.folder, subfolder="tokenizer")
        return tokenizer

    def num_tokens(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        """With the marks of start and end."""
        tokenizer = self.load_tokenizer()
        # without `verbose` transformers does not warn of what is only counted here
        tokens = tokenizer(list(prompts), verbose=False).input_ids
        return [len(ids) for ids in tokens], int(tokenizer.model_max_length)

    def load_encoder(self, device: str | torch.device = "cpu") -> TextEncoder:
        """Tokenizer and CLIP text encoder."""
        from transformers import CLIPTextModel, CLIPTokenizer

        parts = load_text_parts(self.folder, {"text_encoder": (CLIPTextModel, CLIPTokenizer)})
        return _OneTextEncoder(parts, device)

    def load_pipeline(self, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
        """See `Backbone`; without the safety checker."""
        nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        return super().load_pipeline(dtype, **nothing, **parts)

    def embedded(self, prompt_embeds: Tensor, pooled: Tensor | None = None) -> dict[str, Tensor]:
        """'text': as they are; ConfigError where pooled ones are given."""
        if pooled is not None:
            raise ConfigError("Stable Diffusion 1.x and 2.x take no pooled embeddings; leave pooled_prompt_embeds out")
        return {"text": prompt_embeds}

    def condition_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """'text': (B, tokens, width)."""
        config = self.component_config("text_encoder")
        return {"text": (batch_size, int(config["max_position_embeddings"]), int(config["hidden_size"]))}

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """ε or v, as the scheduler's prediction type says."""
        unet: Any = denoiser
        dtype = next(denoiser.parameters()).dtype  # as unet.dtype, which walks all modules for it (4 ms a call)
        output: Tensor = unet(
            latents.to(dtype), time.to(latents.device), encoder_hidden_states=tensors["text"].to(dtype)
        ).sample
        return output

    def output_layers(self, denoiser: nn.Module) -> Sequence[nn.Module]:
        """conv_norm_out and conv_out."""
        unet: Any = denoiser
        return [layer for layer in (unet.conv_norm_out, unet.conv_out) if layer is not None]

    def embedding_point(self, denoiser: nn.Module) -> tuple[nn.Module, int]:
        """The time embedding."""
        module: Any = denoiser.get_submodule("time_embedding")
        return module, module.linear_2.out_features

    def adapted_layers(self, denoiser: nn.Module) -> dict[str, Row]:
        """Every linear layer and convolution; those of the time embedding and its projections have a row a sample."""
        return {
            name: "sample" if "time_emb" in name else "token"
            for name, module in denoiser.named_modules()
            if isinstance(module, nn.Linear | nn.Conv2d)
        }


class _OneTextEncoder(TextEncoder):
    """'text' (tokens, width): the last hidden states."""

    def features(self, prompt: str) -> Features:
        """See `TextEncoder`."""
        return {"text": self.parts["text_encoder"](self._token_ids("text_encoder", prompt))[0][0]}
