"""What a dry run fills in where the command says nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

import ctrl_ray
from ctrl_ray.config import ControlConfig
from ctrl_ray.config.presets import ANIMALS, preset
from ctrl_ray.planning.assumed import CONTROL, DATA, MACHINES, assumed
from ctrl_ray.policy.base_model import is_outline
from tests.configs import tiny_run


def test_a_preset_without_control_and_data_can_be_planned_where_nothing_is() -> None:
    """Each thing that is taken for granted has its line."""
    config, machines, without_data, lines = assumed(preset("sdxl"), None)
    assert is_outline(config.base_model) and config.controls == CONTROL and config.prompts_file == str(ANIMALS)
    assert (config.data, machines, without_data) == (DATA, MACHINES, True)
    assert [line.split()[0] for line in lines] == ["base", "controls", "data", "prompts", "machines"]
    assert assumed(config, "4x1x24GB").machines == "4x1x24GB"


def test_what_is_given_stays(tiny_pipeline: Path, tmp_path: Path) -> None:
    """A run that says everything is planned as it is; a fitted classifier needs no data, but prompts."""
    whole = tiny_run(tiny_pipeline)
    assert assumed(whole, None) == (whole, None, False, [])
    fitted = dataclasses.replace(
        whole, data=None, controls={"size": ControlConfig(classifier=str(tmp_path), classes=("a", "b"))}
    )
    found = assumed(fitted, None)
    assert found.config == dataclasses.replace(fitted, prompts_file=str(ANIMALS)) and not found.without_data
    assert [line.split()[0] for line in found.lines] == ["prompts"]


def test_the_plan_of_an_outline_needs_no_weights(tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole dry run of the smallest known model, at 64 pixels: memory with its text encoder, and a price."""
    base = preset("stable-diffusion")
    config = dataclasses.replace(
        base,
        sampler=dataclasses.replace(base.sampler, height=64, width=64),
        micro_batch_size_per_worker=1,
        rewards=dataclasses.replace(base.rewards, decode_chunk_size=1),
        scaling=dataclasses.replace(base.scaling, gradient_checkpointing=False),
    )
    ctrl_ray.fit(config, dry_run=True, machines="4x1x24GB")
    printed = capsys.readouterr().out
    assert printed.startswith(
        "base model stable-diffusion-v1-5/stable-diffusion-v1-5 is not on this machine: counted from"
    )
    assert "what it made; it takes 469.4 MiB before anything else is there, and goes" in printed  # 123,060,480 × 4
    assert "4 nodes, 32 CPUs, 4 GPUs of 22.4 GiB, stated and not looked for" in printed
    assert "fits       yes" in printed
    assert "4 × g6e.2xlarge" in printed and "in all" in printed
    assert [line.partition("uses ")[2] for line in printed.splitlines() if "8 × H100" in line] == ["4 of its 8 cards"]
