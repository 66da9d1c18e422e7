"""Distances to exact samples, on samples whose law is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ctrl_ray.verification.distances import Comparison, compare, mmd, own_distance
from ctrl_ray.verification.measured import Measured
from ctrl_ray.verification.rejection import accept
from ctrl_ray.verification.target import joint_classes
from tests.unit.verification.samples import HUE, LEVEL, hue_log_probs, level_log_probs, without_images

CONTROLS = {"hue": dataclasses.replace(HUE, oracle=None), "level": LEVEL}
EXPONENTS = {"hue": 2.0, "level": 1.0}
CLASSES = joint_classes(CONTROLS)


def _log_probs(strength: np.ndarray) -> dict[str, np.ndarray]:
    return {"hue": hue_log_probs(strength), "level": level_log_probs(strength)}


def _pool(count: int, seed: int, prompts: tuple[str, ...] = ("a", "b")) -> Measured:
    strength = np.random.default_rng(seed).uniform(size=count)
    return without_images(strength, np.zeros((count, 2)), _log_probs(strength), prompts=prompts)


def _accepted(pool: Measured, index: int) -> np.ndarray:
    return accept(pool.class_log_probs, EXPONENTS, CLASSES, pool.sample_ids, seed=0)[index]


def _asked(samples: Measured, rows: np.ndarray, index: int) -> Measured:
    """Some samples, as if they had been asked for a class."""
    strength = samples.values["strength"][rows]
    labels = np.tile(CLASSES[index].labels, (len(strength), 1))
    taken = [prompt for prompt, row in zip(samples.prompts, rows, strict=True) if row]
    return dataclasses.replace(without_images(strength, labels, _log_probs(strength)), prompts=tuple(taken))


@pytest.mark.parametrize("index", [pytest.param(0, marks=pytest.mark.full), 5])
def test_exact_samples_are_at_the_noise_floor_and_others_are_not(index: int) -> None:
    """Rejection samples of another pool: ratios near 1. Untilted ones: far above, and as far as 'before' says."""
    pool, fresh = _pool(1600, 0), _pool(1600, 1)
    exact = _accepted(pool, index)
    good = _by_key(compare(pool, exact, _asked(fresh, _accepted(fresh, index), index), CLASSES[index], CONTROLS))
    bad = _by_key(compare(pool, exact, _asked(fresh, np.ones(1600, bool), index), CLASSES[index], CONTROLS))
    assert set(good) == {
        *((f"log p({name})", distance) for name in CONTROLS for distance in ("Wasserstein", "Kolmogorov–Smirnov")),
        *(("strength", "Wasserstein"), ("features", "MMD")),
    }
    for key, found in bad.items():
        assert good[key].ratio < 2.2 < found.ratio, key
        assert found.reached == pytest.approx(found.before, rel=0.35), key
    halves = exact[::2].sum() // 2 + exact[1::2].sum() // 2
    assert (found.num_samples, found.num_prompts) == (halves, 2)


def _by_key(comparisons: list[Comparison]) -> dict[tuple[str, str], Comparison]:
    return {(item.statistic, item.distance): item for item in comparisons}


def test_prompts_are_the_same_on_all_sides() -> None:
    """One prompt's images suit the class far better than the other's: a sampler that is exact for each prompt, and asked for
    both equally often, is at the noise floor."""
    rng = np.random.default_rng(2)
    classes = joint_classes({"hue": HUE})

    def drawn(count: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        strength = np.where(np.arange(count) % 2 == 0, 0.75, 0.25) + rng.uniform(-0.25, 0.25, size=count)
        return strength, {"hue": hue_log_probs(strength)}

    strength, log_probs = drawn(2000)
    pool = without_images(strength, np.zeros(2000), log_probs, prompts=("bright", "dull"))
    (_, exact) = accept(log_probs, {"hue": 2.0}, classes, pool.sample_ids, seed=0)
    assert exact[::2].sum() > 8 * exact[1::2].sum()
    strength, log_probs = drawn(3000)
    (_, kept) = accept(log_probs, {"hue": 2.0}, classes, np.arange(3000), seed=1)
    even = min(kept[::2].sum(), kept[1::2].sum())
    strength = np.stack([strength[0::2][kept[::2]][:even], strength[1::2][kept[1::2]][:even]], axis=1).ravel()
    labels = np.ones(len(strength))
    tuned = without_images(strength, labels, {"hue": hue_log_probs(strength)}, prompts=("bright", "dull"))
    found = _by_key(compare(pool, exact, tuned, classes[1], {"hue": dataclasses.replace(HUE, oracle=None)}))
    assert found["strength", "Wasserstein"].ratio < 2
    assert found["strength", "Wasserstein"].num_prompts == 2


def test_too_few_samples_are_not_compared() -> None:
    """Nineteen of one prompt make two halves of nine; prompts of which a side has none do not count."""
    pool = _pool(3000, 3, prompts=("a",))
    exact, few = np.flatnonzero(_accepted(pool, 5)), np.zeros(3000, dtype=bool)
    tuned = _asked(pool, _accepted(pool, 5), 5)
    few[exact[:19]] = True
    assert compare(pool, few, tuned, CLASSES[5], CONTROLS) == []
    few[exact[:20]] = True
    assert {item.num_samples for item in compare(pool, few, tuned, CLASSES[5], CONTROLS)} == {10}
    elsewhere = dataclasses.replace(tuned, prompts=("b",) * len(tuned))
    assert compare(pool, few, elsewhere, CLASSES[5], CONTROLS) == []
    assert compare(pool, few, tuned, CLASSES[2], CONTROLS) == []  # none was asked for it


def test_a_statistic_that_never_varies_is_as_good_as_exact() -> None:
    """And infinitely far, where it does vary on the other side; results.json holds None for that."""
    same = Comparison("s", "Wasserstein", 0.0, 0.0, 0.0, 10, 1)
    assert same.ratio == 1
    far = dataclasses.replace(same, reached=0.5)
    assert far.ratio == float("inf") and far.to_row()["ratio"] is None and far.to_row()["reached"] == 0.5


def test_a_control_is_judged_by_its_oracle_or_else_by_its_classifier() -> None:
    assert own_distance("hue", HUE) == ("hue", "Wasserstein")
    assert own_distance("level", LEVEL) == ("log p(level)", "Kolmogorov–Smirnov")


def test_mmd_is_zero_for_equal_sets_and_grows_with_the_distance() -> None:
    rng = np.random.default_rng(3)
    one, near, far = (rng.normal(shift, 1, (200, 4)) for shift in (0.0, 0.3, 1.0))
    assert mmd(one, one) == pytest.approx(0, abs=1e-3)
    assert mmd(one, near) < mmd(one, far)
    assert mmd(np.ones((5, 4)), np.ones((5, 4))) == 0
