"""What `scaling.precision` means: types of a denoiser's weights and products, TF32, layers that stay float32."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_ray.config import Precision

_HALF: Mapping[Precision, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def half_dtype(precision: Precision) -> torch.dtype | None:
    """The 16-bit type that the denoiser computes in; None for fp32 and tf32."""
    return _HALF.get(precision)


def frozen_dtype(precision: Precision) -> torch.dtype:
    """Of a frozen denoiser's weights."""
    return _HALF.get(precision, torch.float32)


def set_float32_precision(precision: Precision) -> None:
    """How this process's GPU multiplies float32 numbers: exactly under fp32, with TF32's 10 bits of mantissa under the rest
    (under bf16 and fp16 those are LoRA's products and the decoder's). Nothing changes on a CPU.

    torch's older switches are used: they set the newer ones (`fp32_precision`) too, whereas setting the newer ones alone
    makes whatever reads the older ones raise.
    """
    allowed = precision != "fp32"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 recommends the newer ones
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


def sampling_precision(asked: Precision | None, training: Mapping[str, Any], device: str | torch.device) -> Precision:
    """The precision to sample an adapter in: `asked`; else, on a GPU, the one it was trained in; else fp32.

    training: the facts of `AdapterInfo`.
    """
    if asked is not None:
        return asked
    trained: Precision = training.get("precision", "fp32")
    return trained if torch.device(device).type == "cuda" else "fp32"


class _InFloat32(nn.Module):
    """A layer with float32 weights in a denoiser of 16 bits: its input is cast up, without autocast and without TF32."""

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, in the type of its weights."""
        with torch.autocast(input.device.type, enabled=False), _exact_convolutions():
            output: Tensor = super().forward(input.to(self.get_parameter("weight").dtype))
        return output


class Float32GroupNorm(_InFloat32, nn.GroupNorm):
    """See `keep_in_float32`."""


class Float32Conv2d(_InFloat32, nn.Conv2d):
    """See `keep_in_float32`."""


class Float32Linear(_InFloat32, nn.Linear):
    """See `keep_in_float32`."""


_IN_FLOAT32: Mapping[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: Float32GroupNorm,
    nn.Conv2d: Float32Conv2d,
    nn.Linear: Float32Linear,
}


def keep_in_float32(layers: Iterable[nn.Module]) -> None:
    """Let these layers compute in float32 inside a 16-bit denoiser, in place; parameters keep their names.

    Rounding of the last layers goes into the KL undiminished, and they hardly cost anything.
    """
    for layer in layers:
        nn.Module.to(layer, torch.float32)
        layer.__class__ = _IN_FLOAT32[type(layer)]


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """No TF32 in convolutions meanwhile (a GPU's; a CPU has none)."""
    switch: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = switch.fp32_precision
    switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before
