"""A device that is not there: its tensors hold their values on the CPU, and no operation mixes them with others.

What CUDA refuses is refused (an operation between a tensor of the device and one of the CPU, or a scalar of the device
added in place to a tensor of the CPU), what it allows is allowed (a scalar of the CPU, indices on the CPU, copies). Its
name is that of torch's lazy device, which takes tensors of a subclass and which nothing here uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("lazy")
_COPIES = ("aten::_to_copy", "aten::copy_")
_CPU_INDICES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")


class _OnDevice(Tensor):
    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> _OnDevice:
        tensor: _OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _MadeFromValues(TorchFunctionMode):
    """torch.tensor makes its values with the device's own kernels; here they are made on the CPU and moved."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device).type == DEVICE.type:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


class _Waits:
    """Names of the operations that made the host wait for the device, in order."""

    names: list[str] | None = None


@contextmanager
def waits() -> Iterator[list[str]]:
    """Collects what makes the host wait for the device: copies between the two, and values that the host asks for."""
    _Waits.names = found = []
    try:
        yield found
    finally:
        _Waits.names = None


@contextmanager
def pretend_device() -> Iterator[torch.device]:
    """Within it, tensors that are made on this device or moved there are on it."""
    with _MadeFromValues(), _Mode():
        yield DEVICE


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    on_device, plain = False, []
    for leaf in _leaves((args, kwargs)):
        if isinstance(leaf, _OnDevice):
            on_device = True
        elif isinstance(leaf, Tensor):
            plain.append(leaf)
    target = kwargs.get("device")
    put_there = on_device if target is None else torch.device(target).type == DEVICE.type
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if not (on_device or put_there):
        return func(*args, **kwargs)
    if _Waits.names is not None and (name == "aten::_local_scalar_dense" or _crosses(name, args, put_there)):
        _Waits.names.append(name)
    if on_device and name not in _COPIES:
        _refuse_mixed(name, args, plain, func._schema.is_mutable)
    output = func(*_map(_values, args), **_map(_values, kwargs))
    if func._schema.is_mutable:  # in place: what was given comes back
        return args[0]
    if output is args[0]:  # a copy that copied nothing
        output = output.clone()
    return _map(_OnDevice, output) if put_there else output


def _crosses(name: str, args: Any, put_there: bool) -> bool:
    """Whether a copy goes from the host to the device or back."""
    if name not in _COPIES:
        return False
    source = args[1] if name == "aten::copy_" else args[0]
    target_there = isinstance(args[0], _OnDevice) if name == "aten::copy_" else put_there
    return isinstance(source, _OnDevice) != target_there


def _values(tensor: Tensor) -> Tensor:
    return tensor.values if isinstance(tensor, _OnDevice) else tensor  # type: ignore[operator]


def _leaves(nest: Any) -> Iterator[Any]:
    if isinstance(nest, tuple | list):
        for item in nest:
            yield from _leaves(item)
    elif isinstance(nest, dict):
        yield from _leaves(tuple(nest.values()))
    else:
        yield nest


def _map(change: Callable[[Tensor], Tensor], nest: Any) -> Any:
    """The same nest with its tensors changed."""
    if isinstance(nest, Tensor):
        return change(nest)
    if isinstance(nest, tuple | list):
        return type(nest)(_map(change, item) for item in nest)
    if isinstance(nest, dict):
        return {key: _map(change, item) for key, item in nest.items()}
    return nest


def _refuse_mixed(name: str, args: Any, plain: list[Tensor], mutates: bool) -> None:
    if name in _CPU_INDICES and isinstance(args[0], _OnDevice):
        return
    if any(tensor.dim() for tensor in plain) or (mutates and not isinstance(args[0], _OnDevice)):
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found at least two, CPU and {DEVICE}"
        )
