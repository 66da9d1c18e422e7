"""Label gains: LoRA whose ranks each class of a control turns up, down or round."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.joined import join_convolution, join_linear

GAINS = "label_gains"
"""Name of the module that an adapted layer gets."""


class LabelGains(nn.Module):
    """What the labels add to one linear layer or convolution: Σ_controls B (scale · g[label] ⊙ A x).

    Each control has its own A (rank, in, ...), B (out, rank) and table g (num_classes + 1, rank), all float32. B starts at
    zero. The table's null row is zero and stays so: a sample whose labels are all null is the pre-trained model's, bit for
    bit. A class alone is the ordinary LoRA B diag(g[y]) A.

    Half of a table starts at 1, what all classes share; the other half runs from −1 at the first class to 1 at the last,
    which suits ordered classes and keeps any two of them apart.
    """

    def __init__(
        self, layer: nn.Linear | nn.Conv2d, num_classes: Mapping[str, int], rank: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        weight = layer.weight
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        self.tables = nn.ModuleDict()
        for name, classes in num_classes.items():
            # drawn on the CPU wherever the layer lies (also on meta, for counting), and float32 whatever its type
            down = torch.empty(rank, layer.weight[0].numel(), device="cpu").normal_(std=1 / rank, generator=generator)
            self.down[name] = nn.Parameter(down.reshape(rank, *weight.shape[1:]).to(weight.device))
            self.up[name] = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))
            table = nn.Embedding(classes + 1, rank, padding_idx=classes, device=weight.device)
            with torch.no_grad():
                table.weight.copy_(_first_gains(classes, rank))
            self.tables[name] = table
        if isinstance(layer, nn.Conv2d):
            self._geometry: tuple[Any, Any, Any] = (layer.stride, layer.padding, layer.dilation)

    def table(self, control: str) -> nn.Embedding:
        """Gains of one control, (num_classes + 1, rank)."""
        table = self.tables[control]
        assert isinstance(table, nn.Embedding)
        return table

    def forward(self, layer_input: Tensor, layer_output: Tensor, labels: Tensor, scale: float) -> Tensor:
        """The adapted output of the layer.

        labels: (B, C), a column for each control. Input (B, ..., in) and output (B, ..., out) of a linear layer, or
        (B, in, H, W) and (B, out, H, W) of a convolution. scale: alpha / rank, times what the adapter is scaled by.
        """
        dtype = layer_output.dtype
        gains = _joined([table(labels[:, column]) for column, table in enumerate(self.tables.values())], 1) * scale
        down = _joined(list(self.down.values()), 0).to(dtype)
        up = _joined(list(self.up.values()), 1).to(dtype)
        gains, layer_input = gains.to(dtype), layer_input.to(dtype)
        if down.dim() == 2:
            inner = F.linear(layer_input, down)
            inner = inner * gains.reshape(len(gains), *[1] * (inner.dim() - 2), -1)
            return join_linear(layer_output, inner, up)
        inner = F.conv2d(layer_input, down, None, *self._geometry)
        return join_convolution(layer_output, inner, up * gains[:, None, :])

    def folded(self, weight: Tensor, labels: Tensor, scale: float) -> Tensor:
        """W + Σ_controls B (scale · diag(g[label])) A, float32 in the shape of W: the layer's weight for one sample's labels
        (C,)."""
        update = torch.zeros(weight.shape[0], weight[0].numel(), device=weight.device)
        for name, label in zip(self.down, labels, strict=True):
            gains = self.table(name).weight[label] * scale
            update = torch.addmm(update, self.up[name] * gains, self.down[name].flatten(1))
        return weight + update.view_as(weight)


def add_label_gains(layers: Mapping[str, nn.Module], num_classes: Mapping[str, int], rank: int, seed: int) -> None:
    """Give each layer its `LabelGains`, as a submodule of its own.

    A control's first A depends on the seed and the layer's place alone, so that every rank draws the same.
    """
    for index, (name, layer) in enumerate(layers.items()):
        if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
            raise ConfigError(
                f"layer {name} is a {type(layer).__name__} that label gains cannot adapt; take it out of lora.target_modules"
            )
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        layer.add_module(GAINS, LabelGains(layer, num_classes, rank, generator))


def label_gains(layer: nn.Module) -> LabelGains:
    """The gains of an adapted layer."""
    found: Any = getattr(layer, GAINS)
    assert isinstance(found, LabelGains)
    return found


def folded_weights(denoiser: nn.Module, labels: Tensor, scale: float) -> dict[str, Tensor] | None:
    """Weights of the adapted layers, by name, for samples that have all the same labels (B, C): with them, the denoiser costs
    what the pre-trained one does. None where two samples differ, and where weights of 16 bits would round the update away."""
    layers = {name: layer for name, layer in denoiser.named_modules() if hasattr(layer, GAINS)}
    weights: dict[str, Any] = {f"{name}.weight": layer.weight for name, layer in layers.items()}
    if not bool((labels == labels[:1]).all()) or any(weight.dtype != torch.float32 for weight in weights.values()):
        return None
    return {
        name: label_gains(layer).folded(weight, labels[0], scale)
        for (name, weight), layer in zip(weights.items(), layers.values(), strict=True)
    }


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    """Ranks of all controls; those of a single one are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _first_gains(classes: int, rank: int) -> Tensor:
    """(classes + 1, rank)."""
    gains = torch.ones(classes + 1, rank)
    gains[:classes, rank // 2 :] = torch.linspace(-1, 1, classes)[:, None]
    gains[classes] = 0
    return gains
