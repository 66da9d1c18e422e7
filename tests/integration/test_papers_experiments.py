"""The paper's two controls at once on a tiny pipeline of the same shape: every stage of the preset, with fewer steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import ctrl_ray
from ctrl_ray.classifiers.classifier import ImageClassifier
from ctrl_ray.config import ClassifierConfig, EvaluationConfig
from ctrl_ray.offline.prompts import read_prompts
from tests.configs import on_a_cpu, tiny_experiment
from tests.tiny import make_tiny_clip, make_tiny_head
from tests.unit.evaluation.helpers import write_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_session")]


def test_two_controls_from_labels_to_the_report(tiny_pipeline: Path, tmp_path: Path) -> None:
    """A convolutional network for the one, a head on CLIP's features for the other; guidance 7.5; judged on animals that are
    held back, with CLIP score and BRISQUE."""
    clip, head = make_tiny_clip(tmp_path / "clip"), make_tiny_head(tmp_path / "aesthetic.safetensors")
    config = on_a_cpu(tiny_experiment("paper-multi-task", tiny_pipeline, clip, head))
    jpeg_size, aesthetic = config.controls.values()
    write_model(tmp_path)
    held_back = config.evaluation.prompts_file
    run = ctrl_ray.fit(
        dataclasses.replace(
            config,
            output_dir=str(tmp_path / "run"),
            num_drawn_images=160,
            controls={  # medians of the drawn images as the tiny pipeline's VAE decodes them
                "jpeg_size": dataclasses.replace(jpeg_size, thresholds=(1472.0,)),
                "aesthetic": dataclasses.replace(aesthetic, thresholds=(4.326,)),
            },
            classifier=ClassifierConfig(epochs=1, batch_size=32),
            sampler=dataclasses.replace(config.sampler, num_steps=3),
            num_updates=1,
            global_batch_size=8,
            micro_batch_size_per_worker=4,
            evaluation=EvaluationConfig(
                every_updates=1,
                num_samples=4,
                final_num_samples=8,
                log_z_samples=8,
                max_log_z_samples=8,
                num_pairs=0,
                batch_size=8,
                prompts_file=held_back,
                clip_model=str(clip),
                brisque_model=str(tmp_path),
            ),
            tracker="none",
        )
    )
    kinds = {name: ImageClassifier.from_pretrained(run.folder / "classifier" / name).kind for name in config.controls}
    assert kinds == {"jpeg_size": "cnn", "aesthetic": "clip"}
    summary = json.loads((run.folder / "report" / "summary.json").read_text())
    for side in (summary["before"], summary["after"]):
        assert set(side["controls"]) == {"jpeg_size", "aesthetic"} and side["joint_accuracy"] is not None
        assert -1 <= side["clip_score"] <= 1 and side["clip_score"] == side["prompt_fidelity"]
        assert side["brisque"] is not None
    assert {"clip_score", "brisque"} <= summary["changes"].keys()
    manifest = json.loads((run.folder / "config.json").read_text())
    assert manifest["controls"]["aesthetic"]["oracle"] == f"clip_head:{head}@{clip}"
    assert len(read_prompts(manifest["evaluation"]["prompts_file"])) == 15
