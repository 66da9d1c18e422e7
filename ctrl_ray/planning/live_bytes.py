"""Counting on fake tensors (shapes, types and lifetimes, no values): bytes that are alive, operations."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

_CPU_ATTENTION = {  # torch's counter knows the GPU's kernels only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda *shapes, **_: sdpa_backward_flop_count(
        *shapes[:4]
    ),
}


_OPERATIONS = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION).flop_registry
"""torch's formulas by operator."""


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations under this mode have made and that are still alive; views count once. And the
    operations: two for each multiply-add of convolutions, matrix products and attention, as torch's own counter (which
    keeps tensors alive).

    Works on real and on fake tensors; what an operation allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self.operations = 0.0
        self._alive: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func._overloadpacket in _OPERATIONS:
            self.operations += _OPERATIONS[func._overloadpacket](*args, **(kwargs or {}), out_val=output)
        for tensor in _tensors(output):
            self.add(tensor)
        return output

    def add(self, tensor: Tensor) -> None:
        """Follow a tensor's storage (also one that was made outside the mode) until it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        size = storage.nbytes()
        self._alive[key] = (weakref.ref(storage, lambda _: self._freed(key)), size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def restart_peak(self) -> int:
        """Forget the peak so far; returns the bytes that are alive now."""
        self.peak = self.bytes
        return self.bytes

    def _freed(self, key: int) -> None:
        self.bytes -= self._alive.pop(key)[1]


def _tensors(values: Any) -> Iterable[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)


def as_fake_cpu(module: nn.Module) -> None:
    """Turn meta parameters and buffers into fake ones on the CPU, where attention chooses the kernels of a real run (on
    the meta device it would keep whole attention matrices). To be called under a `FakeTensorMode`."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                fake = nn.Parameter(
                    torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=parameter.requires_grad
                )
                part._parameters[name] = fake
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
