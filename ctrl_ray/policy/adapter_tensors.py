"""The tensors of an adapter's files, checked one by one against the policy that is to take them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ctrl_ray.errors import ModelError
from ctrl_ray.policy.adapter_info import AdapterInfo, adapter_folder
from ctrl_ray.policy.control.gains import GAINS
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.lora import LORA_NAME
from ctrl_ray.policy.pipeline_files import check_safetensors, weight_files

LORA_FILE = "pytorch_lora_weights.safetensors"
EMBEDDINGS_FILE = "control_embeddings.safetensors"
GAINS_FILE = "label_gains.safetensors"


def adapter_tensors(folder: str | Path, info: AdapterInfo, policy: ControlledPolicy) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter of the policy, its value) of everything that an adapter holds, file by file.

    ModelError names the file that is missing, damaged or not finite, and the tensor that has another name or shape than the
    policy's. A policy on torch's meta device serves for checking.
    """
    folder = adapter_folder(folder)
    if info.lora is None or info.kind != "gains":
        yield from _embeddings(folder / EMBEDDINGS_FILE, info, policy)
    if info.lora is None:
        yield from _denoiser(folder / policy.backbone.denoiser, policy)
    elif info.kind != "embedding":
        yield from _gains(folder / GAINS_FILE, info, policy)
    else:
        yield from _lora(folder / LORA_FILE, policy)


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Those of one file of an adapter; ModelError where it is missing or damaged, or a tensor is no finite numbers."""
    if not file.is_file():
        raise ModelError(f"{file} does not exist; the adapter folder is incomplete: copy it again")
    try:
        check_safetensors(file)
        tensors = load_file(file)
    except (ModelError, SafetensorError, OSError, ValueError) as error:
        text = str(error) if isinstance(error, ModelError) else f"{file} cannot be read ({error})"
        raise ModelError(f"damaged adapter: {text}") from error
    for name, tensor in tensors.items():
        if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
            raise ModelError(
                f"damaged adapter: {file} holds {name} as {tensor.dtype}; expected floating-point numbers of 16 bits or more"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"damaged adapter: {file} holds numbers in {name} that are not finite; export an earlier checkpoint of the "
                "run, or train again with a smaller optimizer.learning_rate"
            )
    return tensors


def _embeddings(file: Path, info: AdapterInfo, policy: ControlledPolicy) -> Iterator[tuple[Tensor, Tensor]]:
    """Tables by control, (num_classes + 1, embedding_dim), null row last."""
    tables = read_tensors(file)
    wanted = {name: policy.controls.table(name).weight for name in info.controls}
    for name, weight in wanted.items():
        have, want = tuple(tables[name].shape) if name in tables else None, tuple(weight.shape)
        if have != want:
            raise ModelError(
                f"{file} holds {'no table' if have is None else list(have)} for control {name!r}; expected {list(want)}: "
                f"{info.num_classes[name]} classes + 1 null row"
            )
        yield weight, tables[name]


def _lora(file: Path, policy: ControlledPolicy) -> Iterator[tuple[Tensor, Tensor]]:
    state = read_tensors(file)
    prefix = f"{policy.backbone.denoiser}."
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    wanted = {
        name.replace(f".{LORA_NAME}.", "."): parameter
        for name, parameter in policy.denoiser.named_parameters()
        if ".lora_" in name and f".{LORA_NAME}." in name
    }
    _require_shapes(file, own, wanted, "this policy's LoRA")
    yield from ((wanted[name], value) for name, value in own.items())


def _gains(file: Path, info: AdapterInfo, policy: ControlledPolicy) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of the adapter's controls; a control that only the policy has keeps its own."""
    state = read_tensors(file)
    wanted = {
        name: parameter
        for name, parameter in policy.denoiser.named_parameters()
        if f".{GAINS}." in name and name.partition(f".{GAINS}.")[2].split(".")[1] in info.controls
    }
    _require_shapes(file, state, wanted, "this policy's label gains")
    yield from ((wanted[name], value) for name, value in state.items())


def _denoiser(folder: Path, policy: ControlledPolicy) -> Iterator[tuple[Tensor, Tensor]]:
    """Every weight of a fully fine-tuned denoiser."""
    files = weight_files(folder)
    if not files:
        raise ModelError(f"{folder} holds no safetensors weights; the adapter folder is incomplete: copy it again")
    state: dict[str, Tensor] = {}
    for file in files:
        state |= read_tensors(file)
    wanted = policy.denoiser.state_dict()
    _require_shapes(folder, state, wanted, "this base model's denoiser")
    yield from ((wanted[name], value) for name, value in state.items())


def _require_shapes(file: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], whose: str) -> None:
    """ModelError where names or shapes differ."""
    have = {name: tuple(value.shape) for name, value in found.items()}
    want = {name: tuple(value.shape) for name, value in wanted.items()}
    if have != want:
        different = sorted(name for name in have.keys() | want.keys() if have.get(name) != want.get(name))
        raise ModelError(
            f"{file} does not fit {whose} ({len(different)} of {len(want)} tensors differ, first {different[0]}: file "
            f"{have.get(different[0])}, policy {want.get(different[0])}); use the same lora.rank and lora.target_modules as "
            "the adapter; if they are the same, the file is damaged: copy it again"
        )
