"""Stable Diffusion 3 and 3.5: a transformer trained by flow matching, two CLIP text encoders, perhaps a T5, a VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrl_ray.embedded import FLOW_PIPELINE, FLOW_TEXT_TOKENS
from ctrl_ray.errors import ModelError
from ctrl_ray.policy.backbones.flow import FlowBackbone
from ctrl_ray.policy.backbones.text import (
    TOKENIZER_OF,
    Features,
    TextEncoder,
    load_text_parts,
    text_elements,
    with_pooled,
)
from ctrl_ray.policy.pipeline_files import check_tokenizer

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

_CLIPS = ("text_encoder", "text_encoder_2")
_T5 = "text_encoder_3"
T5_TOKENS = 256
"""As diffusers' pipeline takes them where it is not told another number; without a T5 there are so many zeros."""


class StableDiffusion3(FlowBackbone):
    """A pipeline of `StableDiffusion3Pipeline`'s components; see `Backbone` for what each member is.

    A condition has 'text', the last but one hidden states of both CLIPs side by side, padded to the T5's width and followed by
    the T5's; and 'pooled', what both CLIPs project.
    """

    rows_of_samples = ("time_text_embed.", *FlowBackbone.rows_of_samples)

    @property
    def frozen_parts(self) -> tuple[str, ...]:  # type: ignore[override]
        """The T5 is among them where the pipeline has one."""
        return (*self._encoders(), "vae")

    @property
    def loading_options(self) -> str:  # type: ignore[override]
        """See `Backbone`."""
        return "" if self.has_t5 else f", {_T5}=None, {TOKENIZER_OF[_T5]}=None"

    @property
    def has_t5(self) -> bool:
        """Whether the folder holds the T5; without it the text has zeros in its place."""
        return (Path(self.folder) / _T5 / "config.json").is_file()

    @property
    def t5_tokens(self) -> int:
        """How many the transformer sees of a T5, or of zeros in its place."""
        own = FLOW_TEXT_TOKENS if self.folder == str(FLOW_PIPELINE) else T5_TOKENS
        return self._sampler.max_sequence_length or own

    @property
    def pipeline_class(self) -> Any:
        """`StableDiffusion3Pipeline`."""
        from diffusers import StableDiffusion3Pipeline

        return StableDiffusion3Pipeline

    @property
    def denoiser_class(self) -> Any:
        """`SD3Transformer2DModel`."""
        from diffusers import SD3Transformer2DModel

        return SD3Transformer2DModel

    def check(self) -> None:
        """See `Backbone`: a text-to-image transformer, and parts of one model."""
        super().check()
        config = self.component_config(self.denoiser)
        channels = config.get("in_channels"), config.get("out_channels")
        if channels[0] != channels[1]:
            raise ModelError(
                f"the transformer of base model {self.folder} has {channels[0]} channels in and {channels[1]} out, as one for "
                "editing; expected that of a text-to-image Stable Diffusion 3"
            )
        clips = [self.component_config(name) for name in _CLIPS]
        pooled = config.get("pooled_projection_dim"), sum(int(clip.get("projection_dim", 0)) for clip in clips)
        width, text = config.get("joint_attention_dim"), sum(int(clip.get("hidden_size", 0)) for clip in clips)
        of_t5 = self.component_config(_T5).get("d_model") if self.has_t5 else width
        if pooled[0] != pooled[1] or width != of_t5 or not isinstance(width, int) or text > width:
            raise ModelError(
                f"base model {self.folder} is made of several models: its transformer takes text of width {width} and pooled "
                f"text of {pooled[0]}, its CLIP encoders give {text} and {pooled[1]}, its T5 {of_t5}; expected the parts of one"
            )
        for encoder in self._encoders():
            check_tokenizer(Path(self.folder) / TOKENIZER_OF[encoder])

    def load_tokenizer(self) -> CLIPTokenizer:
        """The first CLIP's: both cut a prompt alike."""
        from transformers import CLIPTokenizer

        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(self.folder, subfolder="tokenizer")
        return tokenizer

    def num_tokens(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        """Of the T5 where there is one, for it reads the most; else of a CLIP."""
        if not self.has_t5:
            tokenizer: Any = self.load_tokenizer()
            limit = int(tokenizer.model_max_length)
        else:
            from transformers import T5TokenizerFast

            tokenizer, limit = T5TokenizerFast.from_pretrained(self.folder, subfolder="tokenizer_3"), self.t5_tokens
        return [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids], limit

    def load_encoder(self, device: str | torch.device = "cpu") -> _ThreeTextEncoders:
        """Tokenizers and text encoders; on a GPU the T5 is in bfloat16 (9 of 18 GiB)."""
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        clip, t5 = (CLIPTextModelWithProjection, CLIPTokenizer), (T5EncoderModel, T5TokenizerFast)
        classes = {name: t5 if name == _T5 else clip for name in self._encoders()}
        large = (_T5,) if torch.device(device).type == "cuda" else ()
        parts = load_text_parts(self.folder, classes, in_bfloat16=large)
        if not self.has_t5:
            parts |= {_T5: None, TOKENIZER_OF[_T5]: None}
        width = int(self.component_config(self.denoiser)["joint_attention_dim"])
        return _ThreeTextEncoders(parts, device, width=width, t5_tokens=self.t5_tokens)

    def load_pipeline(self, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
        """See `Backbone`."""
        nothing = {} if self.has_t5 else {_T5: None, TOKENIZER_OF[_T5]: None}
        return super().load_pipeline(dtype, **(nothing | parts))

    def encoder_bytes(self, *, on_gpu: bool) -> int:
        """See `Backbone`."""
        t5 = text_elements(Path(self.folder) / _T5) if self.has_t5 and on_gpu else 0
        return super().encoder_bytes(on_gpu=on_gpu) - 2 * t5

    def embedded(self, prompt_embeds: Tensor, pooled: Tensor | None = None) -> dict[str, Tensor]:
        """'text' and 'pooled': as they are; ConfigError without the pooled ones."""
        return with_pooled("Stable Diffusion 3", prompt_embeds, pooled)

    def condition_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """'text': (B, tokens of CLIP and T5, width); 'pooled': (B, width)."""
        config = self.component_config(self.denoiser)
        tokens = int(self.component_config("text_encoder")["max_position_embeddings"]) + self.t5_tokens
        return {
            "text": (batch_size, tokens, int(config["joint_attention_dim"])),
            "pooled": (batch_size, int(config["pooled_projection_dim"])),
        }

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The velocity."""
        dtype = next(denoiser.parameters()).dtype
        output: Tensor = denoiser(
            hidden_states=latents.to(dtype),
            timestep=time.to(latents.device).expand(len(latents)),
            encoder_hidden_states=tensors["text"].to(dtype),
            pooled_projections=tensors["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return output

    def embedding_point(self, denoiser: nn.Module) -> tuple[nn.Module, int]:
        """The time embedding."""
        module: Any = denoiser.get_submodule("time_text_embed.timestep_embedder")
        return module, module.linear_2.out_features

    def _encoders(self) -> list[str]:
        return [*_CLIPS, *([_T5] if self.has_t5 else [])]


class _ThreeTextEncoders(TextEncoder):
    """'text' (tokens, width) and 'pooled' (width,)."""

    def __init__(self, parts: Mapping[str, Any], device: str | torch.device, *, width: int, t5_tokens: int) -> None:
        """width, t5_tokens: of the T5, also where there is none."""
        super().__init__(parts, device)
        self._width, self._t5_tokens = width, t5_tokens

    def features(self, prompt: str) -> Features:
        """See `TextEncoder`."""
        hidden, pooled = [], []
        for encoder in _CLIPS:
            of_encoder, projected = self.of_clip(encoder, prompt)
            hidden.append(of_encoder)
            pooled.append(projected)
        of_clip = torch.cat(hidden, dim=-1)
        of_clip = F.pad(of_clip, (0, self._width - of_clip.shape[-1]))
        if self.parts[_T5] is None:
            of_t5 = of_clip.new_zeros(self._t5_tokens, self._width)
        else:
            of_t5 = self.parts[_T5](self._token_ids(_T5, prompt, self._t5_tokens))[0][0].float()
        return {"text": torch.cat([of_clip, of_t5]), "pooled": torch.cat(pooled)}
