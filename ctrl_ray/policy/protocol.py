"""What a policy is given and what it is: prompts, labels and guidance in, a prediction out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ctrl_ray.diffusion.steps import NO_GUIDANCE, Guidance, ModelOutput


@dataclass(frozen=True)
class Condition:
    """The condition c of B samples; its tensors are opaque outside of the backbone that made them."""

    prompts: tuple[str, ...]
    tensors: Mapping[str, Tensor]
    """Text features and the like, each (B, ...); cached per prompt by the encoder that made them."""
    null_tensors: Mapping[str, Tensor] | None = None
    """The same of the empty prompt, each (B, ...), for classifier-free guidance; None: this family has no such branch."""

    def __len__(self) -> int:
        return len(self.prompts)

    def select(self, rows: Sequence[int]) -> Condition:
        """The condition of some of the samples, in the given order."""
        index = torch.as_tensor(rows, dtype=torch.long)

        def chosen(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor[index.to(tensor.device)] for name, tensor in tensors.items()}

        return Condition(
            tuple(self.prompts[int(row)] for row in rows),
            chosen(self.tensors),
            None if self.null_tensors is None else chosen(self.null_tensors),
        )


@dataclass(frozen=True)
class Inputs:
    """What B trajectories are asked for, the same at every step."""

    condition: Condition
    labels: Tensor
    """(B, C) int64, one column per control; its number of classes = null."""
    guidance: Guidance = NO_GUIDANCE

    def __len__(self) -> int:
        return len(self.condition)

    def repeated(self, labels: Tensor) -> Inputs:
        """The same samples once more below, with these labels."""
        rows = [*range(len(self)), *range(len(self))]
        return Inputs(self.condition.select(rows), torch.cat([self.labels, labels]), self.guidance)

    def select(self, rows: Sequence[int]) -> Inputs:
        """The inputs of some of the samples, in the given order."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.labels.device)
        return Inputs(self.condition.select(rows), self.labels[index], self.guidance)


class Policy(Protocol):
    """The one module that owns every trainable parameter; the engine wraps it."""

    latent_shape: tuple[int, ...]

    def __call__(self, latents: Tensor, time: Tensor, inputs: Inputs, *, reference: bool) -> ModelOutput:
        """Prediction for latents (B, ...); `reference=True`: the pre-trained model's, whatever the labels."""
        ...


def policy_for_latents(policy: Policy) -> Policy:
    """The same policy, where `torch.autograd.grad` to its latents goes through it; an engine says what that is."""
    found: Policy = getattr(policy, "for_latents", policy)
    return found


def beside_reference(policy: Policy, inputs: Inputs) -> Inputs | None:
    """Inputs of twice as many samples, the second half of them the pre-trained model's: one forward is then policy and
    reference. None: the policy needs one for each."""
    found = getattr(policy, "beside_reference", None)
    doubled: Inputs | None = None if found is None else found(inputs)
    return doubled


class Encoder(Protocol):
    """Prompts to conditions."""

    def encode(self, prompts: Sequence[str]) -> Condition:
        """The condition of each prompt, cached where it costs something."""
        ...


class TextParts(Encoder, Protocol):
    """The encoder of a pipeline's own text encoders, which other tools may change in place."""

    @property
    def parts(self) -> Mapping[str, Any]:
        """What it consists of, by diffusers' names."""
        ...

    def to(self, device: str | torch.device) -> TextParts:
        """Move it; returns itself."""
        ...

    def forget(self) -> None:
        """Drop what is cached: its parts may have been changed."""
        ...


class TrainablePolicy(nn.Module):
    """A `Policy` that an engine can train."""

    latent_shape: tuple[int, ...]

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its name in this module."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def parameter_groups(self, learning_rate: float, embedding_learning_rate: float) -> list[dict[str, Any]]:
        """Optimizer groups with their peak learning rates."""
        raise NotImplementedError
