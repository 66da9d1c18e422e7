"""What a checked run says of its prompts and data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ctrl_ray.config import ClassifierConfig, ControlConfig, TrainConfig
from ctrl_ray.config.presets import preset
from ctrl_ray.offline.images import to_png
from ctrl_ray.planning.data import data_lines
from ctrl_ray.planning.preflight import preflight
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.prompt_lengths import cut_prompts


def test_data_that_are_not_read_are_told() -> None:
    fitted, to_fit = ControlConfig(classifier="/c/jpeg"), ControlConfig(thresholds=(1.0,))
    config = TrainConfig(controls={"jpeg_size": fitted}, data="/d/mine.parquet")
    (line,) = data_lines(config, 16)
    assert line == (
        "data       /d/mine.parquet: only its prompts are read, no image and no label: there are classifiers already, of "
        "jpeg_size (/c/jpeg); to fit them on the data: --refit-classifier"
    )
    assert "nothing of it is read" in data_lines(replace(config, prompts_file="p.txt"), 16)[0]
    assert data_lines(replace(config, controls={"jpeg_size": fitted, "own": to_fit}), 16) == []
    assert data_lines(replace(config, data="shapes"), 16) == data_lines(replace(config, data=None), 16) == []


def test_labelled_images_take_memory_and_need_prompts(tmp_path: Path) -> None:
    """CFG fine-tuning keeps the latents of the label budget, and warns of images without prompts."""
    config = TrainConfig(training_method="cfg", data="shapes", num_drawn_images=3000)
    (line,) = data_lines(config, 256)
    assert line == (
        "data       3,000 labelled images, encoded at the first update: every worker keeps 2.9 MiB of latents in host memory"
    )
    few = replace(config, classifier=ClassifierConfig(max_images=1024))
    assert "1,024 labelled images" in data_lines(few, 256)[0] and "1.0 MiB" in data_lines(few, 256)[0]
    image = to_png(Image.new("RGB", (8, 8)))
    for name, columns in {"without": {}, "empty": {"prompt": ["", ""]}, "with": {"prompt": ["", "a cat"]}}.items():
        file = tmp_path / f"{name}.parquet"
        pq.write_table(pa.table({"image": [image, image], "size": [1.0, 2.0], **columns}), file)
        memory, *warning = data_lines(replace(config, data=str(file)), 256)
        assert memory.startswith("data       2 labelled images") and len(warning) == (name != "with")
        assert not warning or (
            warning[0].startswith(
                f"data       warning: {file} has no prompts: training_method cfg trains with the empty prompt"
            )
        )


def test_a_plan_of_labelled_images_speaks_of_no_trajectory() -> None:
    """CFG fine-tuning: what an update computes, holds and sends, and the sampler with a scale of the label."""
    config = preset("shapes-cfg")
    local = replace(config.rewards, num_actors=0)
    config = replace(config, sampler=replace(config.sampler, control_scale=2.0), rewards=local)
    text = preflight(config).summary
    for line in (
        "batch      64 labelled images per update = 1 worker × 1 micro-batch × 64; 24 prompts",
        "sampler    DDIM, 64 × 64 pixels, 10 steps, eta 1, guidance_scale 1, control_scale 2",
        "denoiser   per sample and update 1 forwards and 1 backwards; 64 and 64 an update",
        "data       6,000 labelled images, encoded at the first update: every worker keeps 5.9 MiB of latents in host memory",
        "calls      per worker and update: 1 denoiser forwards and 1 backwards of a micro-batch",
        "reward requests 0.0 KiB (answers 0.0 KiB)",
    ):
        assert line in text, line
    assert "clean, noise, noised" in text and "peak of the backward (sum)" in text
    for word in ("trajectories", "rollout", "adjoint", "cotangents", "peak of scoring", "a reward actor  "):
        assert word not in text.split("\n\nbatch")[1], word


def test_prompts_beyond_the_text_encoder_are_told() -> None:
    """The example's reads 8 tokens, the marks of start and end among them."""
    backbone = load_backbone("shapes")
    fits, long = "a red circle", "a red circle beside a blue square above a green triangle"
    assert cut_prompts(backbone, {fits}) == cut_prompts(backbone, set()) == []
    (line,) = cut_prompts(backbone, {fits, long})
    assert line == f"1 of 2 prompts are cut: the text encoder reads 8 tokens; the longest has 25: {long!r}"
