"""Comparison with rejection samples, on samples whose law is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import DataError
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.oracles import Oracle, colourfulness, measure
from ctrl_ray.verification.rejection import (
    compare,
    draw_labels,
    format_comparisons,
    image_features,
    mmd,
    plot_rejection,
)

CONTROL = ControlConfig(thresholds=(80.0,), classes=("grey", "colourful"), oracle="colourfulness")


def _samples(saturation: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> EvaluationSamples:
    """Images of 16 × 16 noise around a colour whose strength is given; p(y=1) = sigmoid((strength − 0.5) 8)."""
    count = len(saturation)
    base = np.array([200.0, 60.0, 60.0])
    grey = base.mean()
    images = grey + saturation[:, None, None, None] * (base - grey) + rng.normal(0, 8, (count, 16, 16, 3))
    p = 1 / (1 + np.exp(-(saturation - 0.5) * 8))
    return EvaluationSamples(
        images=images.clip(0, 255).astype(np.uint8),
        prompts=("a",) * count,
        labels=labels[:, None].astype(np.int64),
        kl=np.full(count, np.nan),
        class_log_probs={"hue": np.log(np.stack([1 - p, p], axis=1))},
        sample_ids=np.arange(count),
    )


def _tilted(rng: np.random.Generator, label: int, count: int) -> np.ndarray:
    """Strengths from p(s) p(label|s), by rejection from the uniform law."""
    drawn = rng.uniform(size=40 * count)
    p = 1 / (1 + np.exp(-(drawn - 0.5) * 8))
    return drawn[rng.uniform(size=len(drawn)) < (p if label else 1 - p)][:count]


@pytest.fixture
def measure_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[Oracle, np.ndarray], np.ndarray]:
    """`compare` and the picture measure the same thousands of images by the same oracle."""
    known: dict[tuple[Oracle, int], np.ndarray] = {}

    def measured(oracle: Oracle, images: np.ndarray) -> np.ndarray:
        key = (oracle, id(images))
        if key not in known:
            known[key] = measure(oracle, images)
        return known[key]

    monkeypatch.setattr("ctrl_ray.verification.rejection.measure", measured)
    return measured


@pytest.mark.full
def test_exact_samples_are_at_the_noise_floor_and_others_are_not(
    measure_once: Callable[[Oracle, np.ndarray], np.ndarray], tmp_path: Path, figures: dict[str, Figure]
) -> None:
    """Tilted exactly: ratios near 1. Untilted: far above, and as far as 'before' says."""
    rng = np.random.default_rng(103)  # not the seed that labels are drawn with
    pool = _samples(rng.uniform(size=1600), np.zeros(1600), rng)
    labels = np.repeat([0, 1], 330)
    exact = _samples(np.concatenate([_tilted(rng, 0, 330), _tilted(rng, 1, 330)]), labels, rng)
    wrong = _samples(rng.uniform(size=660), labels, rng)
    good = {(c.label, c.statistic, c.distance): c for c in compare(pool, exact, "hue", CONTROL, num_bootstraps=8)}
    bad = {(c.label, c.statistic, c.distance): c for c in compare(pool, wrong, "hue", CONTROL, num_bootstraps=8)}
    assert len(good) == 12
    for key in [(label, "measured", name) for label in (0, 1) for name in ("Wasserstein", "Kolmogorov–Smirnov")]:
        assert good[key].ratio < 2.2 < 4 < bad[key].ratio, key
        assert bad[key].reached == pytest.approx(bad[key].before, rel=0.25)
    assert good[0, "features", "MMD"].ratio < 1.3 < bad[0, "features", "MMD"].ratio
    assert "Wasserstein" in format_comparisons(list(good.values()), CONTROL.class_names)
    assert plot_rejection(tmp_path / "r.png", pool, exact, "hue", CONTROL).is_file()
    of_pool, of_exact = (measure_once(colourfulness, samples.images) for samples in (pool, exact))
    groups = draw_labels(pool, "hue", 0), labels
    for label, axis in enumerate(figures["r.png"].axes):
        _check_densities(axis, of_pool, *(values[group == label] for values, group in zip((of_pool, of_exact), groups)))


def _check_densities(axis: Axes, pool: np.ndarray, drawn: np.ndarray, tuned: np.ndarray) -> None:
    """An outline of the pool, bars of its rejection samples, an outline of the tuned ones."""
    outline, *bars, other_outline = axis.patches
    edges = np.array([*(bar.get_x() for bar in bars), bars[-1].get_x() + bars[-1].get_width()])
    for found, values in (
        (outline.get_xy()[1:-1:2, 1], pool),
        ([bar.get_height() for bar in bars], drawn),
        (other_outline.get_xy()[1:-1:2, 1], tuned),
    ):
        np.testing.assert_allclose(found, np.histogram(values, edges, density=True)[0], atol=1e-6)


def test_labels_are_drawn_from_the_classifier() -> None:
    """Their share among the samples is the mean probability; the same seed draws the same."""
    rng = np.random.default_rng(1)
    pool = _samples(rng.uniform(size=4000), np.zeros(4000), rng)
    drawn = draw_labels(pool, "hue", 3)
    assert np.array_equal(drawn, draw_labels(pool, "hue", 3)) and not np.array_equal(drawn, draw_labels(pool, "hue", 4))
    p = np.exp(pool.class_log_probs["hue"][:, 1])
    for low, high in ((0.0, 0.2), (0.8, 1.0)):
        inside = (p >= low) & (p <= high)
        assert drawn[inside].mean() == pytest.approx(p[inside].mean(), abs=0.03)


def test_too_few_samples_of_a_class_are_an_error() -> None:
    """It says which class and what to do."""
    rng = np.random.default_rng(2)
    pool = _samples(rng.uniform(size=200), np.zeros(200), rng)
    with pytest.raises(DataError, match=r"class 1 of hue.*--num-samples"):
        compare(pool, _samples(rng.uniform(size=50), np.zeros(50), rng), "hue", CONTROL)


def test_mmd_is_zero_for_equal_sets_and_grows_with_the_distance() -> None:
    """And the features do not depend on the image's size."""
    rng = np.random.default_rng(3)
    one, near, far = (rng.normal(shift, 1, (200, 4)) for shift in (0.0, 0.3, 1.0))
    assert mmd(one, one) == pytest.approx(0, abs=1e-3)
    assert mmd(one, near) < mmd(one, far)
    flat = np.full((2, 40, 24, 3), 128, dtype=np.uint8)
    np.testing.assert_allclose(image_features(flat), image_features(np.full((2, 64, 64, 3), 128, dtype=np.uint8)))
