"""The sampling command with candidates: manifest, what is told, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ctrl_ray.candidates.trust import ess_lines
from ctrl_ray.config import SamplerConfig
from ctrl_ray.errors import ConfigError
from ctrl_ray.pipeline import ControlledPipeline
from ctrl_ray.policy.adapter import add_training_facts
from ctrl_ray.sample import SampleConfig, image_seed, main, sample
from tests.classifiers import save_classifier
from tests.unit.test_pipeline import CONTROLS, _export

PROMPTS = ("a red circle", "a blue cross")


@pytest.fixture(scope="module")
def adapter(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "adapter"
    _export(tiny_pipeline, folder, SamplerConfig(num_steps=2))
    add_training_facts(folder, {"kl_coef": 1.0})
    save_classifier(folder / "classifier" / "size", "size", CONTROLS["size"])
    return folder


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


@pytest.mark.full
def test_the_adapter_with_the_classifier_that_it_carries(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows tell candidates and ESS; an image does not depend on the batch; the pipeline gives it again."""
    argv = ["--adapter", str(adapter), "--prompt", *PROMPTS, "--control", "size=high", "--adapter-scale", "0.003"]
    options = ["--seed", "7", "--num-images", "3", "--candidates", "4"]
    for batch_size in ("1", "3"):
        output = ["--batch-size", batch_size, "--output-dir", str(tmp_path / batch_size)]
        assert main([*argv, *options, *output]) == 0
    rows, again = _rows(tmp_path / "3"), _rows(tmp_path / "1")
    sizes = [row["ess"] for row in rows]
    assert rows[2] == {
        "file": "00002.png",
        "prompt": "a red circle",
        "control": {"size": 2},
        "seed": image_seed(7, 2),
        "candidates": 4,
        "ess": sizes[2],
    }
    assert all(1 <= size <= 4 for size in sizes) and sizes == pytest.approx([row["ess"] for row in again], abs=0.01)
    pictures = [np.asarray(Image.open(tmp_path / name / "00001.png")).astype(int) for name in ("1", "3")]
    pipeline = ControlledPipeline.from_pretrained(adapter)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(image_seed(7, 1))
    same = pipeline(PROMPTS[1], controls={"size": 2}, adapter_scale=0.003, generator=generator, num_candidates=4)
    for picture in pictures:
        assert np.abs(picture - np.asarray(same.images[0]).astype(int)).max() <= 1
    told = capsys.readouterr().out
    mean = sum(sizes) / 3
    assert f"effective sample size: {mean:.1f} of 4 candidates, mean over 3 images (least {min(sizes):.1f})" in told


def test_without_an_adapter(adapter: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    classifier = f"size={adapter / 'classifier' / 'size'}"
    config = SampleConfig(
        base_model=str(tiny_pipeline),
        classifier=(classifier,),
        exponent=("size=2",),
        control=("size=0",),
        prompt=PROMPTS,
        num_images=2,
        num_steps=2,
        candidates=3,
        output_dir=str(tmp_path),
    )
    sample(config)
    rows = _rows(tmp_path)
    assert [(row["control"], row["candidates"]) for row in rows] == [({"size": 0}, 3)] * 2
    assert all(1 <= row["ess"] <= 3 for row in rows)


def test_a_small_effective_sample_size_is_said(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("\n".join(json.dumps({"candidates": 8, "ess": size}) for size in (1.0, 1.5)))
    assert ess_lines(manifest) == [
        "effective sample size: 1.2 of 8 candidates, mean over 2 images (least 1.0)",
        "warning: that is below 3: a single candidate often had most of the weight, so the images may be far from the target. "
        "Try --candidates 32, an adapter that is trained for longer, or a smaller exponent",
    ]
    manifest.write_text("\n".join(json.dumps({"candidates": 8, "ess": size}) for size in (5.0, 6.0)))
    assert len(ess_lines(manifest)) == 1
    manifest.write_text(json.dumps({"candidates": 2, "ess": 1.6}))
    assert len(ess_lines(manifest)) == 1, "two candidates cannot count as three"
    manifest.write_text(json.dumps({"seed": 1}))
    assert ess_lines(manifest) == []


@pytest.mark.full
def test_what_is_refused(adapter: Path, tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        arguments = {"adapter": str(adapter), "prompt": PROMPTS, "output_dir": str(tmp_path / "none"), "candidates": 8}
        with pytest.raises(ConfigError, match=re.escape(message)):
            sample(SampleConfig(**(arguments | changes)))

    refused("candidates is 0; expected at least 1", candidates=0)
    refused(
        "--classifier weighs candidates or steers a method, but candidates is 1", classifier=("size=x",), candidates=1
    )
    refused("--exponent weighs candidates or steers a method, but candidates is 1", exponent=("size=1",), candidates=1)
    refused("--base asks for no control", base=True)
    refused("no adapter is given", adapter=None)
    refused("the pre-trained model has no control 'size=1'", adapter=None, base_model="shapes", control=("size=1",))
    refused("--classifier 'size' is not NAME=VALUE", classifier=("size",), control=("size=1",))
    refused("--exponent size=two is not a number", exponent=("size=two",), control=("size=1",))
    refused("no control is asked for")
    refused("there is no classifier of control 'hue'", control=("hue=1",))
    assert not (tmp_path / "none").exists()
