"""One LoRA for all labels: peft's layers, names and files, and our own order of its products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftLoraConfig
from peft.tuners import lora as peft_lora
from torch import Tensor, nn

from ctrl_ray.config import LoraConfig
from ctrl_ray.policy.joined import join_convolution, join_linear

LORA_NAME = "default"
"""peft's name of our LoRA in a denoiser, which may hold others beside it."""


class _Joined(nn.Module):
    """A layer of peft's that adds our LoRA's update in the type of the layer's output, by one operation.

    peft's own order makes a float32 copy of a 16-bit input, which the graph keeps, and multiplies in float32. It still computes
    where another adapter is active beside ours, or where the update is in the weights already.

    Measured against it (2026-11-29, one thread of an AMD EPYC, `shapes` with LoRA on every layer, medians of pairs): forward
    and backward of the policy in .92 of the CPU time in float32, .93 in bf16; a graph in bf16 takes .63 of the bytes, for
    Stable Diffusion 1.5 .77 by the planner's count. KL that rounding adds (`kl_noise_floor`, nats over 10 steps, without
    guidance and at 3): .0064 and .077 in bf16 (peft's order: .0059 and .077), .0006 and .0024 in fp16 (.0006 and .0023).
    """

    active_adapters: list[str]
    disable_adapters: bool
    merged: bool
    base_layer: nn.Module
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    scaling: dict[str, float]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, adapted where adapters are on."""
        if self.disable_adapters or self.merged or self.active_adapters != [LORA_NAME]:
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        output = self.base_layer(x, *args, **kwargs)
        # modules are called, though one function could read all weights: ZeRO-3 gathers a module's when it is called
        inner = self.lora_A[LORA_NAME](x.to(output.dtype))
        adapted: Tensor = self.lora_B[LORA_NAME](inner, output, self.scaling[LORA_NAME])
        return adapted


class _JoinedLinear(_Joined, peft_lora.Linear):
    pass


class _JoinedConv2d(_Joined, peft_lora.Conv2d):
    pass


class _DownLinear(nn.Linear):
    """A, in the type of what it multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., rank)."""
        return F.linear(x, self.weight.to(x.dtype))


class _DownConv2d(nn.Conv2d):
    """A, in the type of what it multiplies."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) to (B, rank, H, W), with the strides of the layer."""
        return F.conv2d(x, self.weight.to(x.dtype), None, self.stride, self.padding, self.dilation)


class _UpLinear(nn.Linear):
    """B, which joins the layer's output."""

    def forward(self, inner: Tensor, output: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """output (..., out) + scale · B inner (..., rank); without an output, as peft calls it, B inner."""
        weight = self.weight.to(inner.dtype)
        if output is None:
            return F.linear(inner, weight)
        return join_linear(output, inner, weight, scale)


class _UpConv2d(nn.Conv2d):
    """B, 1 × 1, which joins the layer's output."""

    def forward(self, inner: Tensor, output: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """output (B, out, H, W) + scale · B inner (B, rank, H, W); without an output, as peft calls it, B inner."""
        weight = self.weight.to(inner.dtype)
        if output is None:
            return F.conv2d(inner, weight)
        return join_convolution(output, inner, weight.flatten(1).expand(len(inner), -1, -1), scale)


_JOINED = {
    peft_lora.Linear: (_JoinedLinear, _DownLinear, _UpLinear),
    peft_lora.Conv2d: (_JoinedConv2d, _DownConv2d, _UpConv2d),
}


def add_lora(denoiser: Any, lora: LoraConfig, seed: int) -> None:
    """Wrap the layers that the config names; float32 whatever the layers' type. B starts at zero."""
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        lora_dropout=0.0,
        init_lora_weights="gaussian",
    )
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)  # peft draws from the global generator; every rank must draw the same
        denoiser.add_adapter(config, adapter_name=LORA_NAME)
    finally:
        torch.set_rng_state(state)
    for name, parameter in denoiser.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    for layer in denoiser.modules():
        if type(layer) in _JOINED:
            down, up = layer.lora_A[LORA_NAME], layer.lora_B[LORA_NAME]
            layer.__class__, down.__class__, up.__class__ = _JOINED[type(layer)]
