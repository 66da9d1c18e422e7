"""What a base model is known by: the tensors and settings that are loaded, and nothing else in its folder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctrl_ray.config import ControlConfig, LoraConfig, SamplerConfig
from ctrl_ray.errors import ModelError
from ctrl_ray.policy.adapter import check_base_model, make_adapter_info
from ctrl_ray.policy.adapter_info import AdapterInfo
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.identity import part_identity
from tests.tiny import edit_json

WEIGHTS = "diffusion_pytorch_model.safetensors"


def _write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"norm_eps": 1e-5, **config}))
    save_file(tensors, folder / WEIGHTS)
    return part_identity(folder.parent, folder.name).sha256


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """One that is hashed whole, and one of 400 kB that is not."""
    generator = torch.Generator().manual_seed(0)
    return {"small": torch.randn(10, generator=generator), "large": torch.randn(10, 10_000, generator=generator)}


def test_the_hash_is_of_names_types_shapes_and_bytes(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """As the docstring says, computed anew: of a large tensor 16 blocks from its first bytes to its last."""
    digest = hashlib.sha256()
    large = tensors["large"].numpy().tobytes()
    digest.update(json.dumps(["large", "F32", [10, 10_000]]).encode())
    for block in range(16):
        start = block * (len(large) - 4096) // 15
        digest.update(large[start : start + 4096])
    digest.update(json.dumps(["small", "F32", [10]]).encode())
    digest.update(tensors["small"].numpy().tobytes())
    assert _write(tmp_path / "unet", tensors) == digest.hexdigest()


def test_what_makes_another_model(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Another name, type or shape; one number of a small tensor; the first or last of a large one; a training step."""
    last = tensors["large"].clone()
    last[-1, -1] += 1
    first = tensors["large"].clone()
    first[0, 0] += 1
    one = tensors["small"].clone()
    one[4] += 1e-3
    found = [
        _write(tmp_path / str(number) / "unet", changed)
        for number, changed in enumerate(
            [
                tensors,
                {"tiny": tensors["small"], "large": tensors["large"]},
                {**tensors, "small": tensors["small"].half()},
                {**tensors, "large": tensors["large"].reshape(10_000, 10)},
                {**tensors, "small": one},
                {**tensors, "large": first},
                {**tensors, "large": last},
                {**tensors, "large": tensors["large"] + 1e-4},
            ]
        )
    ]
    assert len(set(found)) == len(found)


def test_files_that_are_not_loaded_and_shards_change_nothing(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    folder = tmp_path / "unet"
    whole = _write(folder, tensors)
    for name in (
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.non_ema.safetensors",
        "old.safetensors",
    ):
        save_file({"other": torch.ones(3)}, folder / name)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    assert part_identity(tmp_path, "unet").sha256 == whole
    (folder / WEIGHTS).unlink()
    places = {"large": "model-2.safetensors", "small": "model-1.safetensors"}
    for name, file in places.items():
        save_file({name: tensors[name]}, folder / file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    assert part_identity(tmp_path, "unet").sha256 == whole


def test_settings_count_where_both_tell_them(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """What another version leaves out or writes beside it is no difference, a value is."""
    _write(tmp_path / "a" / "unet", tensors, act_fn="silu", _diffusers_version="0.1")
    _write(
        tmp_path / "b" / "unet", tensors, act_fn="silu", _diffusers_version="0.2", dual=False, transformers_version="5"
    )
    _write(tmp_path / "c" / "unet", tensors, norm_eps=1e-6)
    a, b, c = (part_identity(tmp_path / name, "unet") for name in "abc")
    assert a.difference(b) is None and b.difference(a) is None
    assert a.difference(c) == "norm_eps 1e-06, not 1e-05"
    assert a.difference(dataclasses.replace(a, sha256="f" * 64)) == f"weights ffffffffffff…, not {a.sha256[:12]}…"


def _info(base: Path) -> AdapterInfo:
    return make_adapter_info(
        base_model=str(base),
        base_revision=None,
        controls={"size": ControlConfig(classes=("a", "b"))},
        sampler=SamplerConfig(num_steps=2),
        lora=LoraConfig(rank=2),
        training={},
    )


def _moved(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda base: shutil.copy(
                base / "unet" / WEIGHTS, base / "unet" / "diffusion_pytorch_model.fp16.safetensors"
            ),
            None,
        ),
        (lambda base: edit_json(base / "unet" / "config.json", _name_or_path="elsewhere"), None),
        (lambda base: edit_json(base / "scheduler" / "scheduler_config.json", timestep_spacing="trailing"), None),
        (
            lambda base: _moved(base / "vae" / WEIGHTS),
            r"another VAE \(the decoder\) with weights \w{12}…, not \w{12}…; the",
        ),
        (
            lambda base: edit_json(base / "vae" / "config.json", scaling_factor=0.3),
            r"another VAE .* with scaling_factor 0\.3, not",
        ),
        (lambda base: _moved(base / "text_encoder" / "model.safetensors"), "another text encoder with weights"),
    ],
    ids=["unused file", "name", "schedule, which the adapter has", "vae", "vae's setting", "text encoder"],
)
def test_an_adapter_knows_the_parts_that_it_was_trained_with(
    change: Callable[[Path], object], message: str | None, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """Another VAE or text encoder is a warning that names it."""
    base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
    info = _info(base)
    change(base)
    found = check_base_model(info, load_backbone(str(base)))
    if message is None:
        assert found is None
    else:
        assert found is not None
        with pytest.raises(ModelError, match=message):
            raise ModelError(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda base: _moved(base / "unet" / WEIGHTS),
            r"holds another denoiser \(weights \w{12}…, not \w{12}…\); give the",
        ),
        (
            lambda base: edit_json(base / "unet" / "config.json", norm_eps=1e-3),
            r"another denoiser \(norm_eps 0\.001, not 1e-05\)",
        ),
    ],
    ids=["weights", "setting"],
)
def test_another_denoiser_is_refused(
    change: Callable[[Path], object], message: str, tiny_pipeline: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
    info = _info(base)
    change(base)
    with pytest.raises(ModelError, match=message):
        check_base_model(info, load_backbone(str(base)))


def test_an_adapter_that_knows_its_denoisers_files_alone(tiny_pipeline: Path, tmp_path: Path) -> None:
    """By the hash over config and files that was stored before; a variant that came later is passed over."""
    base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
    config = json.loads((base / "unet" / "config.json").read_text())
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(public, sort_keys=True).encode())
    digest.update(WEIGHTS.encode() + (base / "unet" / WEIGHTS).read_bytes())
    info = dataclasses.replace(_info(base), base_parts={}, base_sha256=digest.hexdigest())
    assert check_base_model(info, load_backbone(str(base))) is None
    shutil.copy(base / "unet" / WEIGHTS, base / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert check_base_model(info, load_backbone(str(base))) is None
    with pytest.raises(ModelError, match=r"denoiser 000000000000…\), but .* holds denoiser"):
        check_base_model(dataclasses.replace(info, base_sha256="0" * 64), load_backbone(str(base)))
