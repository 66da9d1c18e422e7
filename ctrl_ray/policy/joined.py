"""What an adapter adds to the output of its layer, by one operation that accumulates in float32 whatever the type."""

from __future__ import annotations

import torch
from torch import Tensor


def join_linear(output: Tensor, inner: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """output (..., out) + scale · up (out, rank) inner (..., rank)."""
    return torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), up.t(), alpha=scale).view_as(output)


def join_convolution(output: Tensor, inner: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """output (B, out, H, W) + scale · up (B, out, rank) inner (B, rank, H, W), sample by sample."""
    return torch.baddbmm(output.flatten(2), up, inner.flatten(2), alpha=scale).view_as(output)
