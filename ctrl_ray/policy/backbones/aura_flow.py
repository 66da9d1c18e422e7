"""AuraFlow: a transformer trained by flow matching, one T5 (the encoder of a UMT5), a VAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_ray.config import SamplerConfig
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.policy.backbones.flow import FlowBackbone
from ctrl_ray.policy.backbones.text import Features, TextEncoder, load_text_parts
from ctrl_ray.policy.pipeline_files import check_tokenizer

TEXT_TOKENS = 256
"""As diffusers' pipeline takes them where it is not told another number."""


class AuraFlow(FlowBackbone):
    """A pipeline of `AuraFlowPipeline`'s components; see `Backbone` for what each member is.

    A condition has 'text', the T5's last hidden states, zero where a prompt has ended.
    """

    frozen_parts = ("text_encoder", "vae")
    rows_of_samples = ("time_step_proj.", *FlowBackbone.rows_of_samples)

    @property
    def text_tokens(self) -> int:
        """How many the transformer sees of a prompt."""
        return self._sampler.max_sequence_length or TEXT_TOKENS

    @property
    def pipeline_class(self) -> Any:
        """`AuraFlowPipeline`."""
        from diffusers import AuraFlowPipeline

        return AuraFlowPipeline

    @property
    def denoiser_class(self) -> Any:
        """`AuraFlowTransformer2DModel`."""
        from diffusers import AuraFlowTransformer2DModel

        return AuraFlowTransformer2DModel

    def prepare_call(self, pipeline: Any, sampler: SamplerConfig, generator: torch.Generator) -> dict[str, Any]:
        """See `Backbone`: with the size, for the pipeline's own is 1024 pixels whatever its transformer says."""
        return self._size_of_call(sampler) | super().prepare_call(pipeline, sampler, generator)

    def usage_scheduler(self, sampler: SamplerConfig) -> tuple[str, str]:
        """See `Backbone`."""
        scheduler, of_call = super().usage_scheduler(sampler)
        return scheduler, of_call + "".join(f"{side}={n}, " for side, n in self._size_of_call(sampler).items())

    def _size_of_call(self, sampler: SamplerConfig) -> dict[str, int]:
        own = dict(zip(("height", "width"), self.image_size(), strict=True))
        return {side: pixels for side, pixels in own.items() if side not in sampler.call_options()}

    def check(self) -> None:
        """See `Backbone`: parts of one model."""
        super().check()
        config, encoder = self.component_config(self.denoiser), self.component_config("text_encoder")
        channels = config.get("in_channels"), config.get("out_channels")
        width = config.get("joint_attention_dim"), encoder.get("d_model")
        if channels[0] != channels[1] or width[0] != width[1]:
            raise ModelError(
                f"base model {self.folder} is made of several models: its transformer has {channels[0]} channels in and "
                f"{channels[1]} out, and takes text of width {width[0]} where its encoder gives {width[1]}; expected the parts "
                "of one AuraFlow"
            )
        check_tokenizer(Path(self.folder) / "tokenizer")

    def num_tokens(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        """See `Backbone`."""
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, subfolder="tokenizer")
        return [len(ids) for ids in tokenizer(list(prompts), verbose=False).input_ids], self.text_tokens

    def load_encoder(self, device: str | torch.device = "cpu") -> _MaskedT5:
        """Tokenizer and text encoder."""
        from transformers import AutoTokenizer, UMT5EncoderModel

        parts = load_text_parts(self.folder, {"text_encoder": (UMT5EncoderModel, AutoTokenizer)})
        return _MaskedT5(parts, device, tokens=self.text_tokens)

    def embedded(self, prompt_embeds: Tensor, pooled: Tensor | None = None) -> dict[str, Tensor]:
        """'text': as they are, padding zeroed; ConfigError where pooled ones are given."""
        if pooled is not None:
            raise ConfigError("AuraFlow takes no pooled embeddings; leave pooled_prompt_embeds out")
        return {"text": prompt_embeds}

    def condition_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """'text': (B, tokens, width)."""
        return {
            "text": (batch_size, self.text_tokens, int(self.component_config(self.denoiser)["joint_attention_dim"]))
        }

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The velocity; the transformer takes times in [0, 1]."""
        dtype = next(denoiser.parameters()).dtype
        output: Tensor = denoiser(
            hidden_states=latents.to(dtype),
            timestep=(time.to(latents.device) / 1000).expand(len(latents)),
            encoder_hidden_states=tensors["text"].to(dtype),
            return_dict=False,
        )[0]
        return output

    def embedding_point(self, denoiser: nn.Module) -> tuple[nn.Module, int]:
        """The time embedding."""
        module: Any = denoiser.get_submodule("time_step_proj")
        return module, module.linear_2.out_features


class _MaskedT5(TextEncoder):
    """'text' (tokens, width)."""

    def __init__(self, parts: Mapping[str, Any], device: str | torch.device, *, tokens: int) -> None:
        super().__init__(parts, device)
        self._tokens = tokens

    def features(self, prompt: str) -> Features:
        """See `TextEncoder`."""
        given = self.parts["tokenizer"](
            prompt, padding="max_length", max_length=self._tokens, truncation=True, return_tensors="pt"
        ).to(self._device)
        mask = given.attention_mask
        hidden = self.parts["text_encoder"](given.input_ids, attention_mask=mask)[0]
        return {"text": (hidden * mask.unsqueeze(-1))[0].float()}
