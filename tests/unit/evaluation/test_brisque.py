"""BRISQUE against definitions written out in loops and integrals, and a regression of two vectors worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats
from scipy.integrate import quad

from ctrl_ray.errors import ModelError
from ctrl_ray.evaluation.brisque import (
    NUM_FEATURES,
    Brisque,
    brisque_features,
    fitted_aggd,
    fitted_ggd,
    normalised_luminance,
)
from tests.unit.evaluation.helpers import write_model


def natural(seed: int = 0, side: int = 24) -> np.ndarray:
    """Smooth blobs under a little noise, uint8 (side, side, 3)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float64)
    return np.clip(smooth + rng.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def test_a_pixel_is_compared_with_its_49_neighbours() -> None:
    """Mean and standard deviation under a Gaussian of sd 7/6, with zeros outside."""
    luminance = natural()[..., 1].astype(np.float64)
    found = normalised_luminance(luminance)
    for row, column in ((0, 0), (5, 11), (23, 3)):
        weights, total, square = 0.0, 0.0, 0.0
        for dy in range(-3, 4):
            for dx in range(-3, 4):
                weight = math.exp(-(dy * dy + dx * dx) / (2 * (7 / 6) ** 2))
                inside = 0 <= row + dy < 24 and 0 <= column + dx < 24
                value = luminance[row + dy, column + dx] if inside else 0.0
                weights, total, square = weights + weight, total + weight * value, square + weight * value**2
        mean = total / weights
        std = math.sqrt(abs(square / weights - mean**2))
        assert found[row, column] == pytest.approx((luminance[row, column] - mean) / (std + 1), rel=1e-9)


@pytest.mark.parametrize("shape", [0.8, 2.0, 5.0])
def test_the_shape_of_a_generalised_gaussian_is_found(shape: float) -> None:
    """Of quantiles in the place of draws: scipy's gennorm, whose variance is that of an integral."""
    values = stats.gennorm(shape).ppf((np.arange(200_000) + 0.5) / 200_000)
    variance = 2 * quad(lambda x: x * x * stats.gennorm.pdf(x, shape), 0, np.inf)[0]
    found, square = fitted_ggd(values)
    assert found == pytest.approx(shape, rel=0.01) and square == pytest.approx(variance, rel=0.01)


def test_a_crooked_gaussian_has_two_widths() -> None:
    """Half normals of sd 1 and 3, each side with weight in proportion to its sd: shape 2, and the mean of an integral."""
    half = np.abs(stats.norm.ppf((np.arange(100_000) + 0.5) / 200_000))
    values = np.concatenate([-half[::4], 3 * half[::4], 3 * half[1::4], 3 * half[2::4]])
    shape, mean, left, right = fitted_aggd(values)
    assert shape == pytest.approx(2, rel=0.02)
    assert (left, right) == (pytest.approx(1, rel=0.01), pytest.approx(9, rel=0.01))
    assert mean == pytest.approx(float(values.mean()), rel=0.02)


def test_features_are_of_two_sizes_and_products_of_neighbours() -> None:
    """Of each size two of the luminance, then four of each product: beside, below, and on both diagonals."""
    image = natural(side=25)
    grey = np.round(image @ np.array([0.298936, 0.587043, 0.114021]))
    normalised = normalised_luminance(grey)
    found = brisque_features(image)
    assert found.shape == (NUM_FEATURES,) and np.isfinite(found).all()
    assert found[:2] == pytest.approx(fitted_ggd(normalised))
    across, down = np.roll(normalised, 1, axis=1), np.roll(normalised, 1, axis=0)
    assert found[2:6] == pytest.approx(fitted_aggd(normalised * across))
    assert found[6:10] == pytest.approx(fitted_aggd(normalised * down))
    assert found[10:14] == pytest.approx(fitted_aggd(normalised * np.roll(down, 1, axis=1)))
    assert found[14:18] == pytest.approx(fitted_aggd(normalised * np.roll(np.roll(normalised, -1, axis=0), 1, axis=1)))
    half = np.asarray(Image.fromarray(grey.astype(np.float32)).resize((13, 13), Image.Resampling.BICUBIC))
    assert found[18:20] == pytest.approx(fitted_ggd(normalised_luminance(half.astype(np.float64))))


def test_the_regression_of_two_vectors_by_hand(tmp_path: Path) -> None:
    write_model(tmp_path)
    model = Brisque.from_folder(tmp_path)
    features = np.ones(NUM_FEATURES)  # scaled: 0
    assert model.score(features) == pytest.approx(10 - 4 * math.exp(-0.5) + 50)
    features[[0, 5]] = 2, 0  # scaled: 1 and -1
    assert model.score(features) == pytest.approx(10 * math.exp(-0.5 * 2) - 4 * math.exp(-0.5 * 1) + 50)
    scores = model(np.stack([natural(), np.full((24, 24, 3), 7, np.uint8)]))
    assert scores[0] == pytest.approx(model.score(brisque_features(natural())))


def test_an_image_without_contrast_has_no_score(tmp_path: Path) -> None:
    """Black: there is nothing to fit."""
    write_model(tmp_path)
    assert np.isnan(Brisque.from_folder(tmp_path)(np.zeros((1, 16, 16, 3), np.uint8))).all()


def test_what_is_not_the_authors_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"allmodel cannot be read from .*expected a folder with allmodel and allrange"
    ):
        Brisque.from_folder(tmp_path)
    write_model(tmp_path)
    good, ranges = (tmp_path / "allmodel").read_text(), (tmp_path / "allrange").read_text()
    for text, message in (
        (good.replace("epsilon_svr", "c_svc"), r"of the kind \('c_svc', 'rbf'\)"),
        (good.partition("10 ")[0], "with 0 support vectors"),
        (good.replace("1:1", "37:1"), "support vector 2, cannot be read .*feature 37 of 36"),
        (good.replace("1:1", "1:x"), "support vector 2, cannot be read"),
    ):
        (tmp_path / "allmodel").write_text(text)
        with pytest.raises(ModelError, match=message):
            Brisque.from_folder(tmp_path)
    (tmp_path / "allmodel").write_text(good)
    (tmp_path / "allrange").write_text(ranges.replace("\n7 0 2", ""))
    with pytest.raises(ModelError, match=r"has no range for the features \[7\]"):
        Brisque.from_folder(tmp_path)
