"""Metrics against numbers computed by hand, by brute force or by SciPy's definitions."""

import itertools
import math

import numpy as np
import pytest

from ctrl_ray.evaluation import metrics

ASKED = np.array([0, 0, 0, 1, 1, 2, 2, 2])
MEASURED = np.array([0, 0, 1, 1, 2, 2, 2, 0])


def test_confusion_and_accuracy_by_hand():
    assert metrics.confusion_matrix(ASKED, MEASURED, 3).tolist() == [[2, 1, 0], [0, 1, 1], [1, 0, 2]]
    assert metrics.accuracy(ASKED, MEASURED) == 5 / 8
    assert math.isnan(metrics.accuracy(ASKED[:0], MEASURED[:0]))


def test_confusion_refuses_a_class_that_does_not_exist():
    with pytest.raises(ValueError, match=r"measured classes span 0\.\.3; expected 0\.\.2"):
        metrics.confusion_matrix(ASKED, np.array([0, 0, 1, 1, 2, 2, 3, 0]), 3)


def test_macro_f1_from_precision_and_recall():
    per_class = []
    for c in range(3):
        precision = np.mean(ASKED[c == MEASURED] == c)
        recall = np.mean(MEASURED[c == ASKED] == c)
        per_class.append(2 * precision * recall / (precision + recall))
    assert metrics.macro_f1(ASKED, MEASURED, 3) == pytest.approx(np.mean(per_class), rel=1e-12)


def test_macro_f1_counts_a_class_that_never_occurs_as_zero():
    # Two perfect classes of three: (1 + 1 + 0) / 3.
    assert metrics.macro_f1(np.array([0, 1]), np.array([0, 1]), 3) == pytest.approx(2 / 3)


def test_diversity_equals_all_pairs_by_brute_force():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(11, 6, 5, 3), dtype=np.uint8)
    classes = np.array([0, 0, 0, 0, 3, 3, 3, 7, 5, 5, 5])  # class 7 has one image: no pair
    per_class = []
    for c in (0, 3, 5):
        members = images[classes == c].astype(np.float64) / 255
        per_class.append(np.mean([np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.combinations(members, 2)]))
    assert metrics.within_class_diversity(images, classes).mean == pytest.approx(np.mean(per_class), rel=1e-12)


def test_diversity_is_exact_for_equal_images_and_across_chunks(monkeypatch):
    image = np.random.default_rng(1).integers(0, 256, size=(1, 9, 9, 3), dtype=np.uint8)
    pair = np.concatenate([image, image])
    assert metrics.within_class_diversity(pair, np.zeros(2, int)).mean == 0.0
    black_and_white = np.stack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)])
    monkeypatch.setattr(metrics, "_PIXELS_AT_A_TIME", 7)
    assert metrics.within_class_diversity(black_and_white, np.zeros(2, int)).mean == 1.0
    assert math.isnan(metrics.within_class_diversity(black_and_white, np.arange(2)).mean)


def test_diversity_error_agrees_with_redrawing_the_images():
    rng = np.random.default_rng(2)
    zeros = np.zeros(40, dtype=int)
    draws = [metrics.within_class_diversity(_noisy_images(rng, 40), zeros) for _ in range(150)]
    spread = np.std([draw.mean for draw in draws], ddof=1)
    # 150 redraws know their own spread to 6 %; the formula leaves out terms of order 1/n.
    assert np.mean([draw.standard_error for draw in draws]) == pytest.approx(spread, rel=0.25)


def _noisy_images(rng: np.random.Generator, count: int) -> np.ndarray:
    """Images whose scale varies, so that some are far from all others."""
    scale = rng.uniform(5, 60, size=(count, 1, 1, 1))
    return np.clip(128 + scale * rng.normal(size=(count, 4, 4, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (7, 20), (491, 512), (20, 20)])
def test_wilson_interval_is_scipys(successes, trials):
    binomtest = pytest.importorskip("scipy.stats").binomtest
    expected = binomtest(successes, trials).proportion_ci(confidence_level=0.95, method="wilson")
    low, high = metrics.wilson_interval(successes, trials, z=1.959963984540054)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_standard_errors_by_hand():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    assert metrics.mean_standard_error(values) == pytest.approx(math.sqrt(38 / 3 / 4))
    share = np.array([True] * 90 + [False] * 10)
    error = metrics.bootstrap_standard_error(lambda rows: float(share[rows].mean()), 100, num_draws=2000)
    assert error == pytest.approx(0.03, rel=0.1)  # sqrt(0.9 * 0.1 / 100)
    assert math.isnan(metrics.mean_standard_error(values[:1]))


def test_paired_difference_by_hand():
    before, after = np.array([True, True, False, True]), np.array([True, False, False, False])
    difference = metrics.paired_difference(before, after)  # 0, -1, 0, -1
    assert difference.mean == -0.5
    assert difference.standard_error == pytest.approx(math.sqrt(1 / 3 / 4))
    assert difference.num_pairs == 4
    with pytest.raises(ValueError, match="as many"):
        metrics.paired_difference(before, after[:2])
