"""What the text encoders of all families share: each prompt is encoded once, and kept on the CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.base_model import is_outline
from ctrl_ray.policy.pipeline_files import naming_part, read_json, stored_elements
from ctrl_ray.policy.protocol import Condition

CACHED_PROMPTS = 2048
"""Half a GiB of Stable Diffusion 1.5's features, 1.3 of SDXL's."""
TOKENIZER_OF = {
    "text_encoder": "tokenizer",
    "text_encoder_2": "tokenizer_2",
    "text_encoder_3": "tokenizer_3",
}
"""diffusers' names of an encoder and of its tokenizer."""
Features = dict[str, Tensor]
"""Of one prompt, by their names in a condition."""


class TextEncoder(ABC):
    """Features of prompts; `TextParts`. The encoders are frozen and float32.

    Features are kept on the CPU, those of the `CACHED_PROMPTS` prompts that were asked for last, so that prompts by the
    million fill neither a GPU nor the host.
    """

    def __init__(self, parts: Mapping[str, Any], device: torch.device | str) -> None:
        """parts: tokenizers and encoders by diffusers' names."""
        self._parts = dict(parts)
        self._device = torch.device(device)
        self._cache: OrderedDict[str, Features] = OrderedDict()
        for model in self._models():
            model.eval().requires_grad_(False)
        self.to(device)

    @abstractmethod
    def features(self, prompt: str) -> Features:
        """Of a prompt, on the encoders' device, without a graph."""

    def null_features(self) -> Features:
        """Of the unconditional branch: the empty prompt's."""
        return self._known("")

    @property
    def parts(self) -> dict[str, Any]:
        """See `TextParts`."""
        return self._parts

    def to(self, device: str | torch.device) -> TextEncoder:
        """See `TextParts`."""
        self._device = torch.device(device)
        for model in self._models():
            nn.Module.to(model, self._device)
        return self

    @torch.no_grad()
    def only(self, prompts: Iterable[str]) -> TextEncoder:
        """Encode these prompts and the empty one now, and let the encoders go, which frees their memory; no other prompt can be
        encoded then. With more prompts than are kept, the encoders stay. Returns itself."""
        wanted = dict.fromkeys(["", *prompts])
        if len(wanted) <= CACHED_PROMPTS:
            for prompt in wanted:
                self._known(prompt)
            self._parts.clear()
        return self

    def forget(self) -> None:
        """See `TextParts`."""
        self._cache.clear()

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition of each prompt, on the device."""
        of_each = [self._known(prompt) for prompt in prompts]
        tensors = {name: torch.stack([features[name] for features in of_each]).to(self._device) for name in of_each[0]}
        null = {name: tensor.to(self._device).expand_as(tensors[name]) for name, tensor in self.null_features().items()}
        return Condition(tuple(prompts), tensors, null)

    def _models(self) -> list[nn.Module]:
        return [part for part in self._parts.values() if isinstance(part, nn.Module)]

    def _known(self, prompt: str) -> Features:
        if prompt not in self._cache:
            assert self._parts, (
                f"the text encoders are gone, and {prompt!r} was not among the prompts that they encoded"
            )
            self._cache[prompt] = {name: tensor.cpu() for name, tensor in self.features(prompt).items()}
            if len(self._cache) > CACHED_PROMPTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(prompt)
        return self._cache[prompt]

    def of_clip(self, encoder: str, prompt: str) -> tuple[Tensor, Tensor]:
        """(last but one hidden states (tokens, width), the output's first entry: what a CLIP with a projection projects)."""
        output = self._parts[encoder](self._token_ids(encoder, prompt), output_hidden_states=True)
        return output.hidden_states[-2][0], output[0][0]

    def _token_ids(self, encoder: str, prompt: str, most: int | None = None) -> Tensor:
        """(1, tokens), padded and cut to what the encoder reads, or to `most`."""
        part = self._parts[TOKENIZER_OF[encoder]]
        length = most or part.model_max_length
        tokens = part(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = tokens.input_ids.to(self._device)
        return ids


def load_text_parts(
    folder: str, classes: Mapping[str, tuple[Any, Any]], *, in_bfloat16: Collection[str] = ()
) -> dict[str, Any]:
    """Encoders and their tokenizers by diffusers' names, float32 but for those in_bfloat16; classes: of the encoder and of its
    tokenizer, by encoder."""
    parts: dict[str, Any] = {}
    with without_progress_bar():
        for encoder, (model, tokenizer) in classes.items():
            name = TOKENIZER_OF[encoder]
            parts[name] = tokenizer.from_pretrained(folder, subfolder=name)
            with naming_part(Path(folder) / encoder):
                dtype = torch.bfloat16 if encoder in in_bfloat16 else torch.float32
                parts[encoder] = model.from_pretrained(folder, subfolder=encoder, dtype=dtype, use_safetensors=True)
    return parts


def text_elements(folder: Path) -> int:
    """Parameters of a text encoder: by its weights, or by its configuration where there are none (`OUTLINES`)."""
    if not is_outline(folder.parent):
        return stored_elements(folder)
    import transformers

    config = read_json(folder / "config.json", "its configuration")
    made = getattr(transformers, config["architectures"][0])
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in made(made.config_class.from_dict(config)).parameters())


def with_pooled(family: str, prompt_embeds: Tensor, pooled: Tensor | None) -> Features:
    """'text' and 'pooled' of embeddings, (B, ...); ConfigError without the pooled ones."""
    if pooled is None:
        raise ConfigError(
            f"{family} takes pooled embeddings beside prompt_embeds; give pooled_prompt_embeds (B, width), or "
            "negative_pooled_prompt_embeds, too"
        )
    return {"text": prompt_embeds, "pooled": pooled}


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
