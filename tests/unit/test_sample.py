"""The sampling command: seeds, manifest, folders, and what it refuses."""

from __future__ import annotations

import json
import re
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ctrl_ray.config import SamplerConfig
from ctrl_ray.errors import ConfigError, RunFolderError
from ctrl_ray.pipeline import ControlledPipeline
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.backbones.stable_diffusion import StableDiffusion
from ctrl_ray.policy.decoder import LatentDecoder
from ctrl_ray.sample import SampleConfig, image_seed, main, sample
from tests.unit.test_pipeline import _export

PROMPTS = ("a red circle", "a blue cross")


@pytest.fixture(scope="module")
def adapter(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    _export(tiny_pipeline, folder, SamplerConfig(num_steps=2))
    return folder


def _read(folder: Path) -> tuple[list[dict[str, Any]], np.ndarray]:
    rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    return rows, np.stack([np.asarray(Image.open(folder / row["file"])).astype(int) for row in rows])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 2000}, "num_steps is 2000, but the model's noise schedule has 1000 steps; expected 1 to 1000"),
        ({"device": "gpu"}, "device 'gpu' is not known to torch; expected one of cpu"),
        ({"device": "cuda:77"}, "device 'cuda:77' is not here; expected one of cpu"),
        ({"output_dir": "file/samples"}, "where a folder is meant"),
        ({"classifier": ("weight=x",), "candidates": 2, "control": ("size=1",)}, "classifiers names ['weight']"),
        (
            {"candidates": 2, "control": ("size=1",), "exponent": ("size=1",)},
            "there is no classifier of control 'size'",
        ),
        ({"candidates": 2}, "no control is asked for"),
        ({"exponent": ("size=nan",), "candidates": 2, "control": ("size=1",)}, "the exponent of 'size' is nan"),
    ],
)
def test_what_is_given_is_checked_before_models_are_loaded(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(StableDiffusion, "load_finetuned", loaded)
    monkeypatch.setattr(StableDiffusion, "load_encoder", loaded)
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    arguments = {"adapter": str(adapter), "prompt": PROMPTS, "output_dir": str(tmp_path / "out"), **changes}
    with pytest.raises(ConfigError, match=re.escape(message)):
        sample(SampleConfig(**arguments))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def _argv(adapter: Path, folder: Path, *more: str) -> list[str]:
    return ["--adapter", str(adapter), "--prompt", *PROMPTS, "--batch-size", "1", "--output-dir", str(folder), *more]


def test_an_interrupt_says_what_is_finished(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 130 and one line; what was written stays."""
    call, calls = ControlledPipeline.__call__, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return call(*args, **kwargs)

    monkeypatch.setattr(ControlledPipeline, "__call__", interrupted)
    assert main(_argv(adapter, tmp_path / "out", "--num-images", "9")) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"stopped; 2 of 9 images are finished, with their manifest in {tmp_path / 'out'}")
    assert [row["file"] for row in _read(tmp_path / "out")[0]] == ["00000.png", "00001.png"]


def test_numbers_that_are_not_finite_are_no_pictures(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a denoiser that overflows: exit status 1, the image's prompt and seed, nothing written."""
    predict = StableDiffusion.predict
    monkeypatch.setattr(StableDiffusion, "predict", lambda *args: predict(*args) * float("inf"))
    assert main(_argv(adapter, tmp_path / "out", "--seed", "-1")) == 1
    told = capsys.readouterr().err
    assert "the latents of 1 of 1 images are not finite, first of image 0 (prompt 'a red circle'" in told
    assert f"seed {image_seed(-1, 0)})" in told and not (tmp_path / "out").exists()


def test_black_pictures_are_no_success(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LatentDecoder, "decode", lambda decoder, latents: torch.zeros(len(latents), 3, 32, 32))
    assert main(_argv(adapter, tmp_path / "out")) == 2
    told = capsys.readouterr().err
    assert told.count("are black") == 1 and "1 of 1 images are black, every pixel is 0: 00000.png" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("default::UserWarning")
def test_long_and_empty_prompts(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A prompt beyond the text encoder is cut, which is said once; an empty one is one."""
    long = "a red circle " * 1000
    argv = ["--adapter", str(adapter), "--prompt", long, "", "a", "--num-images", "6", "--batch-size", "2"]
    assert main([*argv, "--num-steps", "3", "--output-dir", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert told.count("are cut") == 1 and "warning: 1 of 3 prompts are cut: the text encoder reads" in told
    assert "warning: num_steps is 3, but the adapter was trained with 2" in told
    assert "indexing errors" not in told and "UserWarning" not in told
    assert [row["prompt"] for row in _read(tmp_path)[0]] == [long, "", "a"] * 2


def test_seeds_are_as_documented() -> None:
    digest = blake2b(b"7/0/3/sample", digest_size=8).hexdigest()
    assert image_seed(7, 3) == int(digest, 16) // 2
    assert len({image_seed(seed, index) for seed in range(20) for index in range(50)}) == 1000


@pytest.mark.full
def test_images_do_not_depend_on_batch_size_or_number(adapter: Path, tmp_path: Path) -> None:
    common = {"adapter": str(adapter), "prompt": PROMPTS, "control": ("size=high", "hue=1"), "seed": 7}
    sample(SampleConfig(**common, num_images=5, batch_size=2, output_dir=str(tmp_path / "five")))
    sample(SampleConfig(**common, num_images=3, batch_size=3, output_dir=str(tmp_path / "three")))
    rows, images = _read(tmp_path / "five")
    assert rows[4] == {
        "file": "00004.png",
        "prompt": "a red circle",
        "control": {"size": 2, "hue": 1},
        "seed": image_seed(7, 4),
    }
    assert [row["prompt"] for row in rows] == [PROMPTS[index % 2] for index in range(5)]
    fewer_rows, fewer = _read(tmp_path / "three")
    assert fewer_rows == rows[:3]
    assert np.abs(fewer - images[:3]).max() <= 1  # rounding of other batch sizes
    assert np.abs(images[0] - images[2]).max() > 1  # same prompt, another seed


@pytest.mark.full
def test_base_draws_the_same_noise_without_adapter(adapter: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    arguments = {"prompt": PROMPTS, "num_images": 3, "seed": 7, "base": True}
    sample(SampleConfig(**arguments, adapter=str(adapter), control=("size=2",), output_dir=str(tmp_path / "base")))
    rows, images = _read(tmp_path / "base")
    assert [row["control"] for row in rows] == [{}, {}, {}]
    pipeline = load_backbone(str(tiny_pipeline)).load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        [row["prompt"] for row in rows],
        num_inference_steps=2,
        eta=1.0,
        guidance_scale=1.0,
        generator=[torch.Generator().manual_seed(row["seed"]) for row in rows],
    ).images
    assert np.abs(images - np.stack([np.asarray(image).astype(int) for image in expected])).max() <= 1
    alone = SampleConfig(**arguments, base_model=str(tiny_pipeline), num_steps=2, output_dir=str(tmp_path / "alone"))
    sample(alone)
    again_rows, again = _read(tmp_path / "alone")
    assert again_rows == rows and np.abs(again - images).max() <= 1


@pytest.mark.full
def test_folders_are_not_overwritten_unasked(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--adapter", str(adapter), "--prompt", *PROMPTS, "--output-dir", str(tmp_path / "out")]
    assert main([*argv, "--num-images", "3", "--control", "size=0"]) == 0
    (tmp_path / "out" / "mine.png").write_bytes(b"not ours")
    assert main([*argv, "--num-images", "1"]) == 2
    assert "already holds manifest.jsonl" in capsys.readouterr().err
    with pytest.raises(RunFolderError):
        sample(SampleConfig(adapter=str(adapter), prompt=PROMPTS, output_dir=str(tmp_path / "out")))
    assert main([*argv, "--num-images", "1", "--overwrite"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00000.png", "manifest.jsonl", "mine.png"]


def test_what_is_refused(adapter: Path, tmp_path: Path) -> None:
    def refused(message: str, **changes: Any) -> None:
        arguments = {"adapter": str(adapter), "prompt": PROMPTS, "output_dir": str(tmp_path / "none"), **changes}
        with pytest.raises(ConfigError, match=re.escape(message)):
            sample(SampleConfig(**arguments))

    refused("unknown control 'sise'; this adapter has ['size', 'hue']", control=("sise=1",))
    refused("class '99999999999999999999' of control 'size'", control=(f"size={'9' * 20}",))
    refused(f"class '{'9' * 5000}' of control 'size'", control=(f"size={'9' * 5000}",))
    refused("class '3' of control 'size' does not exist; expected one of 0 = 'low'", control=("size=3",))
    refused("is not NAME=CLASS", control=("size",))
    refused("once for each control", control=("size=1", "size=2"))
    refused("expected either --prompt or --prompts-file; got neither", prompt=())
    refused("no adapter is given", adapter=None)
    refused("no adapter is given", adapter=None, base_model="shapes")
    refused("the pre-trained model has no control", adapter=None, base=True, base_model="shapes", control=("size=1",))
    refused("num_images is 0", num_images=0)
    refused("batch_size is 0; expected at least 1", batch_size=0)
    refused("eta is 2.0; expected a number in [0, 1]", eta=2)
    refused("eta is nan; expected a finite number", eta=float("nan"))
    refused("adapter_scale is inf; expected a finite number", adapter_scale=float("inf"))
    refused("guidance_scale is 0.0; expected at least 1", guidance_scale=0)
    refused("num_steps is 0; expected at least 1", num_steps=0)
    refused("seed is -2; expected at least -1", seed=-2)
    refused("output_dir is 's3://bucket/out'; expected a folder", output_dir="s3://bucket/out")
    refused("prompt 'caf\\udce9' is no text", prompt=("caf\udce9",))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("encoding", ["cp1252", "utf-8"])
def test_prompts_in_a_code_page_are_read_when_it_is_named(
    encoding: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_bytes("café\n".encode("cp1252"))
    flags = [
        "--base",
        "--base-model",
        "shapes",
        "--prompts-file",
        str(tmp_path / "prompts.txt"),
        "--encoding",
        encoding,
    ]
    flags += ["--num-images", "1", "--num-steps", "1", "--output-dir", str(tmp_path / "out")]
    assert main(flags) == (0 if encoding == "cp1252" else 2)
    if encoding == "cp1252":
        (row,) = (tmp_path / "out" / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(row)["prompt"] == "café"
    else:
        assert "give --encoding cp1252" in capsys.readouterr().err
