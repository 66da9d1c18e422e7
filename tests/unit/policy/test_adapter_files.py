"""Adapters as people have them: cut, incomplete, written by hand, another folder than the one that is meant."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ctrl_ray.config import AdapterConfig, ControlConfig, LoraConfig, SamplerConfig, TrainConfig
from ctrl_ray.errors import ModelError
from ctrl_ray.pipeline import ControlledPipeline
from ctrl_ray.policy.adapter import load_into_policy, make_adapter_info, save_adapter
from ctrl_ray.policy.adapter_info import read_adapter_info
from ctrl_ray.policy.adapter_tensors import adapter_tensors
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import check_adapter, check_init_adapter
from ctrl_ray.policy.controlled import ControlledPolicy
from tests.policies import make_policy

CONTROLS = {"size": ControlConfig(classes=("low", "high")), "hue": ControlConfig(thresholds=(3.0,), unit="x")}
LORA = LoraConfig(rank=2)
FILES = {
    "embedding": ("pytorch_lora_weights.safetensors", "control_embeddings.safetensors"),
    "gains": ("label_gains.safetensors",),
    "both": ("label_gains.safetensors", "control_embeddings.safetensors"),
    "whole": ("unet/diffusion_pytorch_model.safetensors", "control_embeddings.safetensors"),
}
CASES = [(kind, file) for kind, files in FILES.items() for file in files]


def _options(kind: str) -> dict[str, Any]:
    return {"lora": None, "kind": "embedding"} if kind == "whole" else {"lora": LORA, "kind": kind}


def _save(folder: Path, base: Path, kind: str) -> Path:
    policy = make_policy(base, {name: c.num_classes for name, c in CONTROLS.items()}, **_options(kind))
    info = make_adapter_info(
        base_model=str(base),
        base_revision=None,
        controls=CONTROLS,
        sampler=SamplerConfig(num_steps=2),
        **_options(kind),
        training={"kl_coef": 1.0, "precision": "fp32"},
    )
    return save_adapter(folder, policy, info)


@pytest.fixture(scope="module")
def adapters(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {kind: _save(folder / kind / "adapter", tiny_pipeline, kind) for kind in FILES}


def _changed(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    return lambda file: save_file(change(load_file(file)), file)


def _first(tensors: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    name = min(tensors)
    return {**tensors, name: change(tensors[name])}


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda file: file.unlink(), "FILE does not exist|holds no safetensors weights"),
    "cut": (
        lambda file: os.truncate(file, file.stat().st_size // 2),
        r"FILE (has [\d,]+ bytes, but|is no safetensors file)",
    ),
    "empty": (lambda file: file.write_bytes(b""), "FILE is no safetensors file"),
    "pointer": (
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
        "FILE is a Git LFS pointer",
    ),
    "nan": (
        _changed(lambda tensors: _first(tensors, lambda t: torch.full_like(t, float("nan")))),
        "FILE holds numbers in .* not finite",
    ),
    "whole numbers": (
        _changed(lambda tensors: _first(tensors, lambda t: t.to(torch.int8))),
        "FILE holds .* as torch.int8",
    ),
    "8 bits": (
        _changed(lambda tensors: _first(tensors, lambda t: t.to(torch.float8_e4m3fn))),
        r"FILE holds .* as torch\.float8_e4m3fn",
    ),
    "shape": (
        _changed(lambda tensors: _first(tensors, lambda t: torch.cat([t, t]))),
        "FILE (does not fit|holds .* for control)",
    ),
    "names": (
        _changed(lambda tensors: {f"x.{name}": tensor for name, tensor in tensors.items()}),
        "FILE (does not fit|holds no table for control)",
    ),
}


@pytest.fixture(scope="module")
def policies(tiny_pipeline: Path) -> dict[str, ControlledPolicy]:
    """Without weights, which looking at an adapter does not need."""
    counts = {name: control.num_classes for name, control in CONTROLS.items()}
    return {kind: make_policy(tiny_pipeline, counts, **_options(kind), empty=True) for kind in FILES}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(("kind", "file"), CASES)
def test_a_damaged_file_is_named(
    kind: str,
    file: str,
    damage: str,
    adapters: dict[str, Path],
    policies: dict[str, ControlledPolicy],
    tmp_path: Path,
) -> None:
    info = read_adapter_info(adapters[kind])
    assert len(list(adapter_tensors(adapters[kind], info, policies[kind]))) > 0
    adapter = Path(shutil.copytree(adapters[kind], tmp_path / "adapter"))
    change, message = DAMAGES[damage]
    change(adapter / file)
    place = f"{re.escape(str(adapter / file))}|{re.escape(str((adapter / file).parent))}"
    with pytest.raises(ModelError, match=message.replace("FILE", f"({place})")):
        list(adapter_tensors(adapter, info, policies[kind]))


def test_half_precision_is_taken(adapters: dict[str, Path], tiny_pipeline: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(adapters["gains"], tmp_path / "adapter"))
    tensors = load_file(adapter / "label_gains.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, adapter / "label_gains.safetensors")
    policy = make_policy(tiny_pipeline, {"size": 2, "hue": 2}, lora=LORA, kind="gains")
    load_into_policy(adapter, policy)
    parameters = dict(policy.denoiser.named_parameters())
    for name, tensor in tensors.items():
        assert parameters[name].dtype == torch.float32 and torch.equal(parameters[name], tensor.half().float())


def test_where_it_is_noticed(adapters: dict[str, Path], tiny_pipeline: Path, tmp_path: Path) -> None:
    """By the pipeline, and before a run that is to go on from it, which also knows what does not fit its settings."""
    adapter = Path(shutil.copytree(adapters["gains"], tmp_path / "adapter"))
    config = TrainConfig(
        base_model=str(tiny_pipeline),
        controls=CONTROLS,
        init_adapter=str(adapter),
        lora=LORA,
        adapter=AdapterConfig(kind="gains"),
    )
    backbone = load_backbone(str(tiny_pipeline))
    assert check_init_adapter(config, CONTROLS, backbone) is None
    wider = dataclasses.replace(config, lora=LoraConfig(rank=3))
    with pytest.raises(ModelError, match=r"does not fit this policy's label gains .* use the same lora\.rank"):
        check_init_adapter(wider, CONTROLS, backbone)
    whole = dataclasses.replace(config, full_finetune=True)
    with pytest.raises(ModelError, match="holds LoRA, but this policy trains the whole denoiser"):
        check_init_adapter(whole, CONTROLS, backbone)
    os.truncate(adapter / "label_gains.safetensors", 4000)
    looks = [
        ControlledPipeline.from_pretrained,
        lambda folder: check_adapter(folder, read_adapter_info(folder)),
        lambda folder: check_init_adapter(config, CONTROLS, backbone),
    ]
    for look in looks:
        with pytest.raises(ModelError, match=r"damaged adapter: .*label_gains\.safetensors"):
            look(adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: [content], "TypeError"),
        (lambda content: "adapter", "TypeError"),
        (lambda content: {**content, "format_version": 3}, "format version 3; this ctrl_ray reads 1 to 2: use"),
        (lambda content: {**content, "format_version": "2"}, "format version 2; this"),
        (lambda content: {**content, "format_version": None}, "format version None"),
        (lambda content: {key: value for key, value in content.items() if key != "controls"}, "KeyError 'controls'"),
        (lambda content: {**content, "controls": ["size"]}, "AttributeError"),
        (lambda content: {**content, "controls": {}}, "controls is empty"),
        (lambda content: {**content, "controls": {"size": {"classes": ["a", "b"]}}}, "KeyError 'thresholds'"),
        (lambda content: {**content, "base_model": "shapes"}, "AttributeError"),
        (lambda content: {**content, "base_model": {"id": 3, "revision": None, "sha256": ""}}, r"base_model\.id is 3 \(int\)"),
        (lambda content: {**content, "base_model": {"id": "shapes", "revision": None}}, "KeyError 'sha256'"),
        (lambda content: {**content, "num_steps": "two"}, r"sampler\.num_steps is 'two' \(str\); expected an integer"),
        (lambda content: {**content, "eta": float("nan")}, r"sampler\.eta is nan"),
        (lambda content: {**content, "lora": {"rank": 0, "alpha": 1.0, "target_modules": ["to_q"]}}, r"lora\.rank is 0"),
        (lambda content: {**content, "lora": {"rank": 2, "alpha": 1.0, "target_modules": "to_q"}}, "lora.target_modules is"),
        (lambda content: {**content, "kind": ["gains"]}, r"has kind \['gains'\]; this ctrl_ray knows gains, embedding, both"),
        (lambda content: {**content, "scheduler": None}, "scheduler is None .*; expected a group"),
        (lambda content: {**content, "training": []}, r"training is \[\] .*; expected a group"),
        (lambda content: {**content, "training": {"kl_coef": "1"}}, r"training\.kl_coef is '1' .*a number"),
        (lambda content: {**content, "training": {"precision": "fp8"}}, r"training\.precision is 'fp8'"),
        (lambda content: {**content, "training": {"evaluation_batch_size": 0}}, "batch_size is 0; expected"),
    ],
)  # fmt: skip
def test_a_description_is_read_strictly(
    change: Callable[[Any], Any], message: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "adapter.json"
    file.write_text(json.dumps(change(json.loads((adapters["embedding"] / "adapter.json").read_text()))))
    with pytest.raises(ModelError, match=f"^{re.escape(str(file))} .*{message}"):
        read_adapter_info(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe{\x00", b"[" * 100_000, '{"a": "é"}'.encode("latin-1")])
def test_a_description_that_is_no_json(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "adapter.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"adapter\.json is not an adapter description of ctrl_ray"):
        read_adapter_info(tmp_path)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ({}, "is one that has no noise schedule of betas"),
        ({"num_train_timesteps": "many", "beta_start": 0.1}, "settings that make no noise schedule"),
        (
            {"num_train_timesteps": 10, "beta_start": 0.1, "beta_schedule": "cosmic"},
            "settings that make no noise schedule",
        ),
    ],
)
def test_a_noise_schedule_that_is_none(
    scheduler: dict[str, Any], message: str, adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(adapters["gains"], tmp_path / "adapter"))
    content = json.loads((adapter / "adapter.json").read_text())
    (adapter / "adapter.json").write_text(json.dumps({**content, "scheduler": scheduler}))
    with pytest.raises(ModelError, match=rf"the scheduler of the adapter \(in adapter\.json\) .*{message}"):
        ControlledPipeline.from_pretrained(adapter)


def test_an_adapter_that_was_written_before_a_setting_of_the_sampler_existed_loads(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    """With what the setting is by itself; the settings that every version wrote are asked for."""
    folder = shutil.copytree(adapters["gains"], tmp_path / "adapter")
    file = folder / "adapter.json"
    content = json.loads(file.read_text())
    first = ("num_steps", "eta", "guidance_scale", "control_scale", "null_branch", "reference_steps")
    later = sorted(dataclasses.asdict(SamplerConfig()).keys() - set(first))
    file.write_text(json.dumps({name: value for name, value in content.items() if name not in later}))
    assert read_adapter_info(folder) == read_adapter_info(adapters["gains"]) and len(later) == 4
    file.write_text(json.dumps({name: value for name, value in content.items() if name != "eta"}))
    with pytest.raises(ModelError, match="KeyError 'eta'"):
        read_adapter_info(folder)


def test_another_folder_than_the_one_that_is_meant(adapters: dict[str, Path], tmp_path: Path) -> None:
    """A run, a run that is not finished, a file, a name of the hub, an empty folder."""
    run = adapters["gains"].parent
    with pytest.raises(ModelError, match=f"^{run} is a run's folder; give its adapter: {run / 'adapter'}$"):
        read_adapter_info(run)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"is the folder of a run that has exported no adapter; finish it with .* --resume"
    ):
        read_adapter_info(tmp_path)
    with pytest.raises(ModelError, match="is a file; expected an adapter folder, such as RUN/adapter"):
        read_adapter_info(run / "adapter" / "adapter.json")
    with pytest.raises(
        ModelError, match=r"someone/adapter does not exist; .*; an adapter on a hub is to be fetched first"
    ):
        read_adapter_info("someone/adapter")
    for odd in ("~nobody-has-this-name/adapter", "a" * 300):
        with pytest.raises(ModelError, match=odd[:20]):
            read_adapter_info(odd)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"empty/adapter\.json does not exist; expected an adapter folder"):
        read_adapter_info(tmp_path / "empty")


def test_an_adapter_of_before_is_read(adapters: dict[str, Path], tmp_path: Path) -> None:
    """Format 1 knew no kinds; the base model was known by its denoiser's files; and what is written now comes back."""
    content = json.loads((adapters["embedding"] / "adapter.json").read_text())
    assert content["format_version"] == 2 and set(content["base_model"]["parts"]) == {"unet", "text_encoder", "vae"}
    info = read_adapter_info(adapters["embedding"])
    for older in (
        {**content, "base_model": {"id": "shapes", "revision": None, "sha256": "0" * 64}},
        {key: value for key, value in content.items() if key not in ("kind", "null_branch")} | {"format_version": 1},
    ):
        (tmp_path / "adapter.json").write_text(json.dumps(older))
        read = read_adapter_info(tmp_path)
        assert (read.controls, read.sampler, read.lora, read.kind) == (info.controls, info.sampler, LORA, "embedding")
    (tmp_path / "adapter.json").write_text(info.to_json())
    assert read_adapter_info(tmp_path) == info and info.to_json() == json.dumps(content, indent=2)


def test_a_base_model_that_has_moved(adapters: dict[str, Path], tiny_pipeline: Path, tmp_path: Path) -> None:
    """Where it was is said, and the option that tells where it is."""
    adapter = Path(shutil.copytree(adapters["gains"], tmp_path / "adapter"))
    content = json.loads((adapter / "adapter.json").read_text())
    content["base_model"]["id"] = str(tmp_path / "gone")
    (adapter / "adapter.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"gone does not exist; .* give base_model, --base-model, where it lies"):
        ControlledPipeline.from_pretrained(adapter)
    assert ControlledPipeline.from_pretrained(adapter, base_model=str(tiny_pipeline)).controls["size"] == (
        "low",
        "high",
    )
