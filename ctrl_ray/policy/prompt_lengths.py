"""Prompts that are longer than a text encoder reads."""

from __future__ import annotations

from collections.abc import Collection

from ctrl_ray.policy.backbones.base import Backbone


def cut_prompts(backbone: Backbone, prompts: Collection[str]) -> list[str]:
    """A line that says how many prompts are too long for the text encoder, if any is."""
    if not prompts:
        return []
    texts = sorted(prompts)
    numbers, limit = backbone.num_tokens(texts)
    most, longest = max(zip(numbers, texts, strict=True))
    if most <= limit:
        return []
    cut = sum(number > limit for number in numbers)
    which = "the prompt is" if len(texts) == 1 else f"{cut} of {len(texts)} prompts are"
    return [f"{which} cut: the text encoder reads {limit} tokens; the longest has {most}: {longest[:60]!r}"]
