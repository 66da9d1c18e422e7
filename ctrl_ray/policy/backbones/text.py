"""What the text encoders of all families share: each prompt is encoded once, and kept on the CPU."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_ray.policy.protocol import Condition

CACHED_PROMPTS = 2048
"""Half a GiB of Stable Diffusion 1.5's features, 1.3 of SDXL's."""
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
            self._cache[prompt] = {name: tensor.cpu() for name, tensor in self.features(prompt).items()}
            if len(self._cache) > CACHED_PROMPTS:
                self._cache.popitem(last=False)
        self._cache.move_to_end(prompt)
        return self._cache[prompt]

    def _token_ids(self, tokenizer: str, prompt: str, most: int | None = None) -> Tensor:
        """(1, tokens), padded and cut to what the encoder reads, or to `most`."""
        part = self._parts[tokenizer]
        length = most or part.model_max_length
        tokens = part(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids: Tensor = tokens.input_ids.to(self._device)
        return ids


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
