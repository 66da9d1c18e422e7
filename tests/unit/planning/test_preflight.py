"""What a checked run says of its prompts and data."""

from __future__ import annotations

from dataclasses import replace

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.planning.preflight import _unread_data
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.prompt_lengths import cut_prompts


def test_data_that_are_not_read_are_told() -> None:
    fitted, to_fit = ControlConfig(classifier="/c/jpeg"), ControlConfig(thresholds=(1.0,))
    config = TrainConfig(controls={"jpeg_size": fitted}, data="/d/mine.parquet")
    (line,) = _unread_data(config)
    assert line == (
        "data       /d/mine.parquet: only its prompts are read, no image and no label: there are classifiers already, of "
        "jpeg_size (/c/jpeg); to fit them on the data: --refit-classifier"
    )
    assert "nothing of it is read" in _unread_data(replace(config, prompts_file="p.txt"))[0]
    assert _unread_data(replace(config, controls={"jpeg_size": fitted, "own": to_fit})) == []
    assert _unread_data(replace(config, data="shapes")) == _unread_data(replace(config, data=None)) == []


def test_prompts_beyond_the_text_encoder_are_told() -> None:
    """The example's reads 8 tokens, the marks of start and end among them."""
    backbone = load_backbone("shapes")
    fits, long = "a red circle", "a red circle beside a blue square above a green triangle"
    assert cut_prompts(backbone, {fits}) == cut_prompts(backbone, set()) == []
    (line,) = cut_prompts(backbone, {fits, long})
    assert line == f"1 of 2 prompts are cut: the text encoder reads 8 tokens; the longest has 25: {long!r}"
