"""Whether a pipeline's folder is whole: every part's configuration and weights, before anything is planned or loaded."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ctrl_ray.errors import ModelError
from ctrl_ray.policy.base_model import is_outline

_LFS = b"version https://git-lfs"
_EARLIER_ATTENTION = (".query.weight", ".proj_attn.weight")
_TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"})
"""Any of these sets of files makes a tokenizer."""


def read_json(file: Path, what: str) -> dict[str, Any]:
    """A JSON object; ModelError names the file where it is missing, is a Git LFS pointer, or is none."""
    try:
        data = file.read_bytes()
        if data.startswith(_LFS):
            raise ModelError(f"{file} is a Git LFS pointer, not {what}; fetch the files (git lfs pull)")
        found = json.loads(data)
    except (OSError, ValueError, RecursionError) as error:
        missing = isinstance(error, FileNotFoundError)
        wrong = "does not exist" if missing else f"is not readable as JSON ({type(error).__name__}: {error})"
        raise ModelError(
            f"base model file {file} {wrong}; expected {what}, as diffusers' save_pretrained writes it"
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} holds no JSON object; expected {what}, as diffusers' save_pretrained writes it")
    return found


def check_weights(folder: Path) -> None:
    """ModelError names what is wrong with a part's safetensors files: missing, of a variant alone, a Git LFS pointer, cut."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if len(file.suffixes) == 1]
    if not plain:
        variants = sorted({file.suffixes[-2].lstrip(".").partition("-")[0] for file in files})
        if variants:
            raise ModelError(
                f"{folder} holds weights of the variant {', '.join(variants)} alone ({files[0].name}); expected files without "
                f"it: load the pipeline with variant={variants[0]!r} in diffusers and write it with save_pretrained"
            )
        raise ModelError(f"{folder} holds no safetensors weights; convert the model with diffusers' save_pretrained")
    for file in plain:
        check_safetensors(file)
    for index in folder.glob("*.safetensors.index.json"):
        named = _shards(index)
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing:
            raise ModelError(
                f"{index} names {missing[0]}, which does not exist; fetch all {len(named)} files of the model"
            )


def check_tokenizer(folder: Path) -> None:
    """ModelError where the files of no kind of tokenizer are there."""
    have = {file.name for file in folder.glob("*")}
    if not any(kind <= have for kind in _TOKENIZERS):
        found = ", ".join(sorted(have)) or "nothing"
        raise ModelError(
            f"base model folder {folder.parent} lacks its tokenizer: {folder} holds {found}; expected tokenizer.json, or "
            "vocab.json and merges.txt, as diffusers' save_pretrained writes them"
        )
    for name in sorted(have):
        if name.endswith(".json"):
            read_json(folder / name, "a part of its tokenizer")


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a part is loaded from: the shards of its index, or the one file of the usual name. A variant
    (.fp16) and whatever else lies beside them are not."""
    for stem in ("diffusion_pytorch_model", "model"):
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        if index.is_file() and not (stem == "model" and single.is_file()):  # transformers prefers the single file
            return [folder / name for name in sorted(_shards(index))]
        if single.is_file():
            return [single]
    return sorted(file for file in folder.glob("*.safetensors") if len(file.suffixes) == 1)


def _shards(index: Path) -> set[str]:
    """Names of the files that an index of shards lists."""
    places = read_json(index, "the index of its shards").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ModelError(f"{index} has no weight_map of tensors to files; fetch or write it again")
    return set(places.values())


def check_stored(folder: Path, module: nn.Module) -> None:
    """ModelError where the tensors that a part is loaded from are not those of `module`, which its config.json made.

    Compares names and shapes from the headers. Attention layers of a VAE may have the names of earlier diffusers.
    """
    if is_outline(folder.parent):
        return
    stored: dict[str, Any] = {}
    for file in weight_files(folder):
        stored |= check_safetensors(file)[0]
    wanted = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    known = wanted.keys() & stored.keys()
    other = next((name for name in sorted(known) if stored[name]["shape"] != wanted[name]), None)
    renamed = any(name.endswith(_EARLIER_ATTENTION) for name in stored)
    missing = sorted(name for name in wanted.keys() - known if not (renamed and ".attentions." in name))
    fix = "fetch configuration and weights of one model, as save_pretrained wrote them"
    if other is not None:
        raise ModelError(
            f"{folder}: tensor {other!r} has the shape {stored[other]['shape']} in its weights, and {wanted[other]} by "
            f"config.json; {fix}"
        )
    if missing:
        raise ModelError(
            f"{folder}: its weights lack {len(missing)} of the {len(wanted)} tensors that config.json asks for, first "
            f"{missing[0]!r}; {fix}"
        )


def stored_elements(folder: Path) -> int:
    """Elements of the float tensors that a part is loaded from, by the headers of its safetensors files; 0 where there is
    none."""
    return sum(
        math.prod(facts["shape"])
        for file in weight_files(folder)
        for facts in check_safetensors(file)[0].values()
        if facts["dtype"].startswith(("F", "BF"))
    )


@contextmanager
def naming_part(folder: Path) -> Iterator[None]:
    """Inside, what a library says of a configuration that it cannot make a part of becomes a ModelError with the folder."""
    try:
        yield
    except (ModelError, torch.OutOfMemoryError):
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{folder} cannot be loaded as its config.json says ({type(error).__name__}: {reason}); fetch configuration and "
            "weights of one model, as save_pretrained wrote them"
        ) from error


def check_safetensors(file: Path) -> tuple[dict[str, Any], int]:
    """(what the header tells of each tensor, where their bytes begin) of a safetensors file that is whole.

    Looked at: the header's length, its JSON, and as many bytes of tensors as it says. ModelError names the file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(len(_LFS))
        if start == _LFS:
            raise ModelError(f"{file} is a Git LFS pointer, not the weights; fetch them (git lfs pull)")
        length = int.from_bytes(start[:8], "little")
        try:
            if length > size - 8:
                raise ValueError("its header is not whole")
            stream.seek(8)
            tensors = json.loads(stream.read(length))
            tensors.pop("__metadata__", None)
            wanted = max((_end(facts) for facts in tensors.values()), default=0)
        except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as error:
            raise ModelError(f"{file} is no safetensors file ({error}); fetch or write it again") from error
    if size != 8 + length + wanted:
        raise ModelError(
            f"{file} has {size:,} bytes, but its header tells of {8 + length + wanted:,}; fetch or write it again"
        )
    return tensors, 8 + length


def _end(facts: Any) -> int:
    """Where the bytes of a tensor end; ValueError and its like where the header does not tell what it should."""
    start, end = facts["data_offsets"]
    sizes = [start, end - start, *facts["shape"]]
    if not isinstance(facts["dtype"], str) or any(type(size) is not int or size < 0 for size in sizes):
        raise ValueError("its header is wrong")
    return int(end)
