"""Base models as people have them: incomplete, damaged, or of another family. Known before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ctrl_ray.errors import ModelError
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.pipeline_files import check_weights, weight_files
from tests.tiny import edit_json

WEIGHTS = "diffusion_pytorch_model.safetensors"


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
        (
            lambda base: (base / "tokenizer" / "vocab.json").write_text('{"a": 1'),
            r"tokenizer/vocab\.json is not readable as JSON",
        ),
        (
            lambda base: edit_json(base / "unet" / "config.json", cross_attention_dim=999),
            r"made of two models: its unet takes text of width 999, its text_encoder gives \d+; expected",
        ),
        (_renamed, r"unet holds weights of the variant fp16 alone .*variant='fp16'"),
        (_flow, "scheduler of base model .* is a FlowMatchEulerDiscreteScheduler, which has no noise schedule"),
        (
            lambda base: edit_json(base / "unet" / "config.json", in_channels=9),
            "unet of base model .* has 9 channels in and 4 out",
        ),
        (
            lambda base: edit_json(base / "unet" / "config.json", addition_embed_type="text_time"),
            "has addition_embed_type 'text_time', .* SDXL",
        ),
        (
            lambda base: edit_json(base / "model_index.json", _class_name="KolorsPipeline"),
            "is a KolorsPipeline, which is no family",
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


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers_per_block": 3}, r"unet.*up_blocks.0.resnets.1.conv1.weight"),
        ({"in_channels": 8, "out_channels": 8}, r"unet.*conv_in.weight.* shape|unet cannot be loaded .*conv_in.weight"),
        ({"norm_num_groups": 7}, r"unet cannot be loaded as its config.json says \(ValueError: num_channels"),
        ({"down_block_types": ["NoSuchBlock"] * 2}, r"unet cannot be loaded as its config.json says \(ValueError"),
    ],
)
def test_weights_of_another_model_than_the_configuration(
    changes: dict[str, object], message: str, empty: bool, tiny_pipeline: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
    edit_json(base / "unet" / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        load_backbone(str(base)).load_denoiser(empty=empty)


@pytest.mark.parametrize("empty", [True, False])
def test_a_tensor_that_is_missing(empty: bool, tiny_pipeline: Path, tmp_path: Path) -> None:
    """diffusers would draw it at random, with a warning."""
    base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
    file = base / "unet" / WEIGHTS
    tensors = load_file(file)
    del tensors["conv_out.bias"]
    save_file(tensors, file)
    with pytest.raises(
        ModelError, match=r"unet: its weights lack 1 of the \d+ tensors .* first 'conv_out.bias'; fetch"
    ):
        load_backbone(str(base)).load_denoiser(empty=empty)


@pytest.mark.parametrize("empty", [True, False])
def test_a_vae_of_another_configuration(empty: bool, tiny_pipeline: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
    (base / "vae" / "config.json").write_text('{"block_out_channels": [64, 64]}')
    with pytest.raises(ModelError, match=r"base/vae"):
        load_backbone(str(base)).load_decoder(empty=empty)


def test_a_vae_may_have_the_names_of_earlier_diffusers(tiny_pipeline: Path, tmp_path: Path) -> None:
    """As Stable Diffusion 1.5's: diffusers renames the attention's tensors when it loads them."""
    base = Path(shutil.copytree(tiny_pipeline, tmp_path / "base"))
    file = base / "vae" / WEIGHTS
    earlier = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, tensor in load_file(file).items():
        parts = [new for new in earlier if f".{new}." in name and ".attentions." in name]
        tensors[name.replace(parts[0], earlier[parts[0]]) if parts else name] = tensor
    assert any(".query." in name for name in tensors)
    save_file(tensors, file)
    load_backbone(str(base)).load_decoder(empty=True)
    load_backbone(str(base)).load_decoder()


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


def test_a_single_file_is_told_how_to_become_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"model\.safetensors is a file; .*from_single_file\('.*'\)\.save_pretrained"):
        load_backbone(str(tmp_path / "model.safetensors"))


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
