"""What is kept of a sample in place of its image."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.oracles import colourfulness, jpeg_size, measure
from ctrl_ray.verification.measured import Measured, image_features, join, load, measure_samples, save
from tests.unit.verification.samples import HUE, LEVEL, evaluation_samples, hue_log_probs, level_log_probs

CONTROLS = {"hue": HUE, "level": LEVEL}


def _samples(count: int = 6, first_id: int = 0) -> EvaluationSamples:
    rng = np.random.default_rng(first_id)
    strength = rng.uniform(size=count)
    log_probs = {"hue": hue_log_probs(strength), "level": level_log_probs(strength)}
    return evaluation_samples(
        strength, np.ones((count, 2)), log_probs, rng, prompts=("a", "b"), first_id=first_id, log_ratio=strength
    )


def test_any_image_has_values_and_a_control_its_oracles() -> None:
    """An oracle that a control uses is measured once, under the control's name."""
    samples = _samples()
    measured = measure_samples(samples, CONTROLS)
    assert set(measured.values) == {"hue", "jpeg_size", "texture", "brightness"}
    np.testing.assert_array_equal(measured.values["hue"], measure(colourfulness, samples.images))
    np.testing.assert_array_equal(measured.values["jpeg_size"], measure(jpeg_size, samples.images))
    np.testing.assert_allclose(measured.values["brightness"], samples.images.mean(axis=(1, 2, 3)), rtol=1e-5)
    shared = measure_samples(samples, {**CONTROLS, "level": dataclasses.replace(HUE, oracle="colourfulness")})
    np.testing.assert_array_equal(shared.values["hue"], shared.values["level"])


def test_an_oracle_is_told_the_prompts() -> None:
    rule = dataclasses.replace(LEVEL, oracle="tests.prompt_rules:jpeg_size_by_prompt", thresholds=(1.0, 2.0))
    samples = dataclasses.replace(_samples(2), prompts=("x strict", "x mild"))
    values = measure_samples(samples, {**CONTROLS, "level": rule}).values
    assert (values["level"] - values["jpeg_size"]).tolist() == [-400.0, 400.0]


def test_texture_is_the_difference_of_neighbours() -> None:
    """Rows of 0 and 10 in turn: 10 from row to row, 0 within a row."""
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    image[::2] = 10
    samples = _samples(1)
    striped = measure_samples(dataclasses.replace(samples, images=image[None]), CONTROLS)
    assert striped.values["texture"] == pytest.approx([10.0])


def test_features_are_colours_and_contrasts_of_blocks_at_any_size() -> None:
    image = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    image[0, :2, :2] = (255, 51, 0)  # the first block
    image[0, 2, 2:4] = 255  # half of the block at (1, 1)
    found = image_features(image)[0]
    assert found.shape == (1024,)
    np.testing.assert_allclose(found[:6], [1, 0.2, 0, 0, 0, 0], atol=1e-6)
    contrasts = found[768:].reshape(16, 16)
    assert contrasts[0, 0] == 0 and contrasts[1, 1] == pytest.approx(0.5)
    flat = np.full((2, 40, 24, 3), 128, dtype=np.uint8)
    np.testing.assert_allclose(image_features(flat), image_features(np.full((2, 64, 64, 3), 128, dtype=np.uint8)))


def test_parts_are_saved_loaded_and_joined(tmp_path: Path) -> None:
    parts = [measure_samples(_samples(6, first_id), CONTROLS) for first_id in (0, 6)]
    for index, part in enumerate(parts):
        save(part, tmp_path / "new" / f"{index}.safetensors")
    whole = join([load(tmp_path / "new" / f"{index}.safetensors") for index in (0, 1)])
    assert whole.prompts == parts[0].prompts + parts[1].prompts and whole.sample_ids.tolist() == list(range(12))
    _check_equal(whole.first(6), parts[0])
    unknown = dataclasses.replace(parts[0], log_ratio=None)
    save(unknown, tmp_path / "u.safetensors")
    assert load(tmp_path / "u.safetensors").log_ratio is None and join([parts[1], unknown]).log_ratio is None


def _check_equal(found: Measured, expected: Measured) -> None:
    assert found.prompts == expected.prompts and found.log_ratio is not None
    for name in ("sample_ids", "labels", "features", "log_ratio"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    for name in ("class_log_probs", "values"):
        one, other = getattr(found, name), getattr(expected, name)
        assert set(one) == set(other)
        for key, each in one.items():
            np.testing.assert_array_equal(each, other[key])
