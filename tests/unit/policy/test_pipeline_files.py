"""Base models as people have them: incomplete, damaged, or of another family. Known before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ctrl_ray.errors import ModelError
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.pipeline_files import check_weights, weight_files

WEIGHTS = "diffusion_pytorch_model.safetensors"


def _edit(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _pointer(base: Path) -> None:
    (base / "vae" / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _renamed(base: Path) -> None:
    for file in list(base.rglob("*.safetensors")):
        file.rename(file.with_suffix(".fp16.safetensors"))


def _flow(base: Path) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
    (base / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda base: shutil.rmtree(base / "scheduler"), r"scheduler_config\.json does not exist; expected"),
        (
            lambda base: (base / "unet" / "config.json").unlink(),
            r"unet/config\.json does not exist; expected the configuration",
        ),
        (lambda base: (base / "vae" / "config.json").write_text("[]"), r"vae/config\.json holds no JSON object"),
        (
            lambda base: shutil.rmtree(base / "tokenizer"),
            r"lacks its tokenizer: .* holds nothing; expected",
        ),
        (lambda base: (base / "model_index.json").write_text('{"_class'), r"model_index\.json is not readable as JSON"),
        (_pointer, rf"vae/{WEIGHTS} is a Git LFS pointer, not the weights"),
        (
            lambda base: os.truncate(base / "unet" / WEIGHTS, 5000),
            rf"unet/{WEIGHTS} is no .* \(its header is not",
        ),
        (
            lambda base: os.truncate(base / "unet" / WEIGHTS, 200_000),
            rf"unet/{WEIGHTS} has 200,000 bytes, but its header",
        ),
        (lambda base: (base / "unet" / WEIGHTS).write_bytes(b""), rf"unet/{WEIGHTS} is no safetensors file"),
        (
            lambda base: (base / "text_encoder" / "model.safetensors").unlink(),
            "text_encoder holds no safetensors weights",
        ),
        (_renamed, r"unet holds weights of the variant fp16 alone .*variant='fp16'"),
        (_flow, "scheduler of base model .* is a FlowMatchEulerDiscreteScheduler, which has no noise schedule"),
        (
            lambda base: _edit(base / "unet" / "config.json", in_channels=9),
            "unet of base model .* has 9 channels in and 4 out",
        ),
        (
            lambda base: _edit(base / "unet" / "config.json", addition_embed_type="text_time"),
            "has addition_embed_type 'text_time', .* SDXL",
        ),
        (
            lambda base: _edit(base / "model_index.json", _class_name="StableDiffusionXLPipeline"),
            "is a StableDiffusionXLPipeline, which is no family",
        ),
    ],
)
def test_what_is_missing_or_damaged_is_named(
    damage: Callable[[Path], object], message: str, tiny_pipeline: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
    damage(base)
    with pytest.raises(ModelError, match=message):
        load_backbone(str(base))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(4)
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (tmp_path / names[0]).write_bytes(content)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": names[0], "v": names[1]}}))
    with pytest.raises(ModelError, match=rf"names {names[1]}, which does not exist; fetch all 2 files"):
        check_weights(tmp_path)
    (tmp_path / names[1]).write_bytes(content)
    check_weights(tmp_path)


def test_a_variant_beside_the_plain_files_is_passed_over(tiny_pipeline: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
    (base / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"cut")
    load_backbone(str(base))


@pytest.mark.parametrize("name", ["~nobody-has-this-name/base", "a" * 300, "a\0b"])
def test_what_is_no_path_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=r"base model .*; (give a diffusers folder|check the name)"):
        load_backbone(name)


@pytest.mark.parametrize(
    "facts",
    [
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": None, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
        {"dtype": "F32", "shape": [1], "data_offsets": [0]},
        [],
    ],
)
def test_a_header_that_does_not_tell_its_tensors(facts: object, tmp_path: Path) -> None:
    header = json.dumps({"w": facts}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ModelError, match=r"model\.safetensors is no safetensors file"):
        check_weights(tmp_path)


@pytest.mark.parametrize("places", [None, [], {"w": 3}, "model.safetensors"])
def test_an_index_that_lists_no_files(places: object, tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ModelError, match=r"index\.json has no weight_map of tensors to files"):
        weight_files(tmp_path)
