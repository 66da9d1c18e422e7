"""The condition of a call that is given prompts or embeddings, as diffusers' pipelines are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.backbones.base import Backbone
from ctrl_ray.policy.protocol import Condition, Encoder


def call_condition(
    backbone: Backbone,
    encoder: Encoder,
    device: torch.device,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    pooled: Tensor | None = None,
    negative_pooled: Tensor | None = None,
) -> Condition:
    """The condition of the prompts, one of text and embeddings; negative ones in the place of the empty prompt.

    pooled, negative_pooled: what some families take beside embeddings. Raises ConfigError for neither or both of a prompt and
    its embeddings, for another number of negative prompts, and for pooled embeddings that are missing or too many.
    """
    if (prompt is None) == (prompt_embeds is None):
        got = "neither" if prompt is None else "both"
        raise ConfigError(f"expected either a prompt or prompt_embeds; got {got}")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ConfigError("expected negative_prompt or negative_prompt_embeds; got both")
    for given, beside, name in (
        (pooled, prompt_embeds, "prompt_embeds"),
        (negative_pooled, negative_prompt_embeds, "negative_prompt_embeds"),
    ):
        if given is not None and beside is None:
            raise ConfigError(f"pooled embeddings were given without {name}; give both, or the prompt alone")
    if prompt_embeds is None:
        assert prompt is not None
        condition = encoder.encode((prompt,) if isinstance(prompt, str) else tuple(prompt))
    else:
        empty = encoder.encode([""] * len(prompt_embeds))
        condition = replace(empty, tensors=backbone.embedded(prompt_embeds.to(device), _on(pooled, device)))
    if negative_prompt is not None:
        texts = (negative_prompt,) * len(condition) if isinstance(negative_prompt, str) else tuple(negative_prompt)
        negative = encoder.encode(texts).tensors
    elif negative_prompt_embeds is not None:
        negative = backbone.embedded(negative_prompt_embeds.to(device), _on(negative_pooled, device))
    else:
        return condition
    count = len(next(iter(negative.values())))
    if count != len(condition):
        raise ConfigError(f"there are {count} negative prompts for {len(condition)} prompts; give one for each")
    return replace(condition, null_tensors=negative)


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
