"""Stable Diffusion 1.x and 2.x: a conditional UNet, one CLIP text encoder, a VAE.

diffusers' and transformers' classes are imported where they are used: a reward actor loads the VAE alone.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ctrl_ray.errors import ModelError
from ctrl_ray.policy.backbones.base import DiffusersBackbone, Row
from ctrl_ray.policy.decoder import LatentDecoder
from ctrl_ray.policy.pipeline_files import check_stored, check_tokenizer, naming_part
from ctrl_ray.policy.protocol import Condition

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

CACHED_PROMPTS = 2048
"""Half a GiB of Stable Diffusion 1.5's features."""


class StableDiffusion(DiffusersBackbone):
    """A pipeline of `StableDiffusionPipeline`'s components; see `Backbone` for what each member is."""

    denoiser = "unet"
    frozen_parts = ("text_encoder", "vae")

    @property
    def pipeline_class(self) -> Any:
        """`StableDiffusionPipeline`."""
        from diffusers import StableDiffusionPipeline

        return StableDiffusionPipeline

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        config = self.component_config(self.denoiser)
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return (config["in_channels"], height, width)

    def image_size(self) -> int:
        """Side in pixels: the latents' times the VAE's factor."""
        blocks = self.component_config("vae")["block_out_channels"]
        return int(self.latent_shape[1] * 2 ** (len(blocks) - 1))

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

    def load_denoiser(self, dtype: torch.dtype = torch.float32, *, empty: bool = False) -> nn.Module:
        """The UNet."""
        if not empty:
            return self.load_finetuned(self.folder, dtype)
        from diffusers import UNet2DConditionModel

        folder = Path(self.folder) / "unet"
        with naming_part(folder), torch.device("meta"):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder))
        check_stored(folder, unet)
        nn.Module.to(unet, dtype)  # diffusers' own warns of submodules to keep in float32, also where there is none
        return unet.eval().requires_grad_(False)

    def load_finetuned(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The UNet that full fine-tuning left in `folder`/unet."""
        from diffusers import UNet2DConditionModel

        with naming_part(Path(folder) / "unet"):
            unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", dtype=dtype, use_safetensors=True)
        check_stored(Path(folder) / "unet", unet)
        return unet.eval().requires_grad_(False)

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
        from transformers import CLIPTextModel

        tokenizer = self.load_tokenizer()
        with without_progress_bar(), naming_part(Path(self.folder) / "text_encoder"):
            text_encoder = CLIPTextModel.from_pretrained(
                self.folder, subfolder="text_encoder", dtype=torch.float32, use_safetensors=True
            )
        return TextEncoder(tokenizer, text_encoder.to(device), device)

    def load_decoder(
        self, chunk_size: int = 32, device: str | torch.device = "cpu", *, empty: bool = False
    ) -> LatentDecoder:
        """The VAE."""
        from diffusers import AutoencoderKL

        folder = Path(self.folder) / "vae"
        if empty:
            with naming_part(folder), torch.device("meta"):
                vae = AutoencoderKL.from_config(self.component_config("vae"))
            check_stored(folder, vae)
            return LatentDecoder(vae, chunk_size)
        with naming_part(folder):
            vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        check_stored(folder, vae)
        return LatentDecoder(vae, chunk_size).to(device)

    def embedded(self, prompt_embeds: Tensor) -> dict[str, Tensor]:
        """'text': as they are."""
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


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Inside, transformers loads without its bar over a few dozen tensors."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class TextEncoder:
    """Text features of prompts; the text encoder is frozen and float32.

    Features are kept on the CPU, those of the `CACHED_PROMPTS` prompts that were asked for last, so that prompts by the
    million fill neither a GPU nor the host.
    """

    def __init__(self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, device: torch.device | str) -> None:
        self._tokenizer = tokenizer
        self._text_encoder = text_encoder.eval().requires_grad_(False)
        self._device = torch.device(device)
        self._cache: OrderedDict[str, Tensor] = OrderedDict()

    @property
    def parts(self) -> dict[str, Any]:
        """See `TextParts`."""
        return {"tokenizer": self._tokenizer, "text_encoder": self._text_encoder}

    def to(self, device: str | torch.device) -> TextEncoder:
        """See `TextParts`."""
        self._device = torch.device(device)
        nn.Module.to(self._text_encoder, self._device)
        return self

    def forget(self) -> None:
        """See `TextParts`."""
        self._cache.clear()

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
            self._cache[prompt] = self._text_encoder(tokens.input_ids.to(self._device))[0][0].cpu()
            if len(self._cache) > CACHED_PROMPTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(prompt)
        return self._cache[prompt]

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Condition with 'text' (B, L, D); the null branch has the features of the empty prompt."""
        text = torch.stack([self._features(prompt) for prompt in prompts]).to(self._device)
        return Condition(tuple(prompts), {"text": text}, {"text": self._features("").to(self._device).expand_as(text)})
