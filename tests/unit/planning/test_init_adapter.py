"""An adapter to go on from is looked at before anything is planned."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from ctrl_ray.classifiers.classifier import read_control
from ctrl_ray.config import TrainConfig
from ctrl_ray.config.presets import shapes
from ctrl_ray.embedded import PIPELINE
from ctrl_ray.errors import ModelError
from ctrl_ray.planning.preflight import preflight
from ctrl_ray.policy.adapter import make_adapter_info, save_adapter
from ctrl_ray.policy.build import build_policy


@pytest.fixture
def going_on(tmp_path: Path) -> TrainConfig:
    """A run of the built-in example from an adapter that has learned nothing."""
    config = shapes()
    controls = {name: read_control(control.classifier or "", name) for name, control in config.controls.items()}
    info = make_adapter_info(
        base_model=config.base_model,
        base_revision=None,
        controls=controls,
        sampler=config.sampler,
        lora=config.lora,
        kind=config.adapter.kind,
        training={},
    )
    save_adapter(tmp_path / "adapter", build_policy(config, controls), info)
    return dataclasses.replace(config, init_adapter=str(tmp_path / "adapter"))


def test_a_damaged_file_is_refused(going_on: TrainConfig, tmp_path: Path) -> None:
    os.truncate(tmp_path / "adapter" / "label_gains.safetensors", 5000)
    with pytest.raises(ModelError, match=r"damaged adapter: .*label_gains\.safetensors"):
        preflight(going_on)


@pytest.mark.full
def test_another_vae_is_told_in_the_plan(going_on: TrainConfig, tmp_path: Path) -> None:
    assert "warning" not in preflight(going_on).summary
    base = Path(shutil.copytree(PIPELINE, tmp_path / "base"))
    vae = base / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(vae).items()}, vae)
    other = dataclasses.replace(going_on, base_model=str(base))
    assert (
        "\nadapter    warning: the adapter was trained on 'shapes' (revision default), but" in preflight(other).summary
    )
