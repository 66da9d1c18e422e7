"""Prompts and what a backbone makes of them; opaque outside `ctrl_ray.policy`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ctrl_ray.diffusion.steps import Guidance, ModelOutput


@dataclass(frozen=True)
class Condition:
    """The condition c of B samples."""

    prompts: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    """Text features and the like, each (B, ...); cached per prompt by the encoder that made them."""

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> Condition:
        """The condition of some of the samples, in the given order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return Condition(
            tuple(self.prompts[int(row)] for row in rows),
            {name: tensor[index.to(tensor.device)] for name, tensor in self.tensors.items()},
        )


class Policy(Protocol):
    """The one module that owns every trainable parameter; the engine wraps it."""

    latent_shape: tuple[int, ...]
    prediction_type: str

    def __call__(
        self,
        latents: Tensor,
        time: Tensor,
        condition: Condition,
        labels: Tensor,
        guidance: Guidance,
        *,
        reference: bool,
    ) -> ModelOutput:
        """Prediction for latents (B, ...) under labels (B, C), null allowed; `reference=True`: the pre-trained model."""
        ...


class Encoder(Protocol):
    """Prompts to conditions."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition of each prompt, cached where it costs something."""
        ...


class TrainablePolicy(nn.Module):
    """A `Policy` that an engine can train."""

    latent_shape: tuple[int, ...]
    prediction_type: str

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its name in this module."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def parameter_groups(self, learning_rate: float, embedding_learning_rate: float) -> list[dict[str, Any]]:
        """Optimizer groups with their peak learning rates."""
        raise NotImplementedError
