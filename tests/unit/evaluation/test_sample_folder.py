"""Samples: from a folder of PNGs, and to and from one file."""

import json

import numpy as np
import pytest
from PIL import Image

from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import ConfigError, DataError
from ctrl_ray.evaluate import EvaluateOptions, main
from ctrl_ray.evaluation.sample_folder import read_sample_folder
from ctrl_ray.evaluation.samples import concatenate, load_samples, save_samples
from ctrl_ray.oracles import jpeg_size
from tests.unit.evaluation.helpers import flat_samples

NOISE = np.random.default_rng(0).integers(0, 256, size=(4, 64, 64, 3), dtype=np.uint8)
CONTROL = ControlConfig(thresholds=(2000.0,), classes=("small", "large"), unit="bytes", oracle="jpeg_size")
CONTROLS = {"jpeg_size": CONTROL}


def _folder(root, asked, **changes):
    """Two flat and two noisy images; `asked` is what each row's control says."""
    root.mkdir(exist_ok=True)
    lines = []
    for index, control in enumerate(asked):
        pixels = NOISE[index] if index % 2 else np.full((64, 64, 3), 40 * index, np.uint8)
        Image.fromarray(pixels).save(root / f"{index:05d}.png")
        row = {"file": f"{index:05d}.png", "prompt": "a red circle", "control": control, "seed": 7}
        lines.append(json.dumps({**row, **changes} if index == 1 else row))
    (root / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_pixels_and_labels_come_back(tmp_path):
    asked = [{"jpeg_size": 0}, {"jpeg_size": "large"}, {}, {"jpeg_size": None}]
    samples = read_sample_folder(_folder(tmp_path, asked), CONTROLS)
    assert samples.labels[:, 0].tolist() == [0, 1, 2, 2]
    assert np.array_equal(samples.images[3], NOISE[3])
    assert np.isnan(samples.kl).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "../outside.png"}, "line 2: file '../outside.png' lies outside"),
        ({"file": "missing.png"}, "line 2: missing.png cannot be read"),
        ({"control": {"size": 1}}, r"line 2: unknown control \['size'\]; the adapter has \['jpeg_size'\]"),
        ({"control": {"jpeg_size": 3}}, r"line 2: class 3 of control 'jpeg_size' does not exist; expected 0\.\.1"),
    ],
)
def test_a_bad_row_is_named(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_sample_folder(_folder(tmp_path, [{}] * 3, **changes), CONTROLS)


def test_a_folder_without_manifest(tmp_path):
    with pytest.raises(DataError, match="does not exist; expected a folder written by"):
        read_sample_folder(tmp_path, CONTROLS)


@pytest.mark.full
def test_command_judges_from_the_images_alone(tmp_path, capsys):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter.json").write_text(json.dumps(_adapter_json()))
    images = _folder(tmp_path / "images", [{"jpeg_size": label} for label in (0, 1, 1, 1)])
    assert jpeg_size(Image.fromarray(NOISE[1])) > 2000 > jpeg_size(Image.new("RGB", (64, 64)))
    assert main(["--adapter", str(adapter), "--images", str(images)]) == 0
    after = json.loads((images / "report" / "summary.json").read_text())["after"]
    assert (after["accuracy"], after["num_samples"], after["kl"]) == (0.75, 4, None)
    assert "0.750" in capsys.readouterr().out
    assert main(["--adapter", str(tmp_path), "--images", str(images)]) == 2
    assert "is a run's folder; give its adapter: " in capsys.readouterr().err


def _adapter_json():
    control = {"classes": CONTROL.classes, "thresholds": CONTROL.thresholds, "unit": "bytes", "oracle": "jpeg_size"}
    return {
        "format_version": 1,
        "base_model": {"id": "shapes", "revision": None, "sha256": "0"},
        "controls": {"jpeg_size": {**control, "guidance_strength": 1.0, "null_label": 2}},
        **{"num_steps": 10, "eta": 1.0, "guidance_scale": 1.0, "control_scale": None, "reference_steps": 0},
        "scheduler": {},
        "lora": None,
        "training": {},
    }


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match="needs --images"):
        EvaluateOptions(adapter="a", before_images="b")


def test_one_file_round_trip_and_joining(tmp_path):
    log_probs = np.log(np.full((2, 3), 1 / 3))
    parts = [flat_samples([1, 2], [0, 1], log_probs=log_probs), flat_samples([3, 4], [2, 3], log_probs=log_probs)]
    joined = concatenate(parts)
    save_samples(joined, tmp_path / "samples.safetensors")
    back = load_samples(tmp_path / "samples.safetensors")
    assert back.prompts == joined.prompts == parts[0].prompts * 2
    for name in ("images", "labels", "kl", "sample_ids", "kl_per_step"):
        assert np.array_equal(getattr(back, name), getattr(joined, name))
    assert np.array_equal(back.class_log_probs["light"], np.concatenate([log_probs] * 2))
    with pytest.raises(DataError, match="does not hold evaluation samples"):
        (tmp_path / "other").write_bytes(b"x" * 100)
        load_samples(tmp_path / "other")


def test_arrays_that_disagree():
    good = flat_samples([1, 2], [0, 1])
    with pytest.raises(DataError, match=r"kl is float32 \(2,\)"):
        type(good)(
            images=good.images,
            prompts=good.prompts,
            labels=good.labels,
            kl=good.kl.astype(np.float32),
            sample_ids=good.sample_ids,
        )
