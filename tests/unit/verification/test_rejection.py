"""Rejection at any exponent and with several controls, on a uniform law whose tilts are known; and the pool's growth."""

from __future__ import annotations

import numpy as np
import pytest

from ctrl_ray.verification.measured import Measured
from ctrl_ray.verification.rejection import Pool, accept, fewest, grow_pool, shortage
from ctrl_ray.verification.target import JointClass, joint_classes, log_tilts
from tests.unit.verification.samples import HUE, LEVEL, hue_log_probs, level_log_probs, without_images

COUNT = 8_000
GRID = (np.arange(COUNT) + 0.5) / COUNT
"""Strengths that are uniform to rounding: means over them are the exact integrals."""
ONE = joint_classes({"hue": HUE})
SIX = joint_classes({"hue": HUE, "level": LEVEL})


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 4.0])
def test_accepted_samples_have_the_law_of_the_target(exponent: float) -> None:
    """Of the uniform law tilted by p̂^λ: acceptance rate Z, mean, and share of each tenth."""
    log_probs = {"hue": hue_log_probs(GRID)}
    accepted = accept(log_probs, {"hue": exponent}, ONE, np.arange(COUNT), seed=0)
    for label in (0, 1):
        _check_law(GRID[accepted[label]], np.exp(exponent * log_probs["hue"][:, label].astype(np.float64)))
    wasted = 1 - accepted.any(axis=0).mean()
    assert (wasted == 0 and not (accepted[0] & accepted[1]).any()) if exponent == 1 else wasted > 0


@pytest.mark.parametrize("exponents", [(1.0, 1.0), (2.0, 0.5), (1.0, 4.0)])
def test_joint_classes_have_the_law_of_the_product(exponents: tuple[float, float]) -> None:
    log_probs = {"hue": hue_log_probs(GRID), "level": level_log_probs(GRID)}
    by_name = dict(zip(log_probs, exponents, strict=True))
    accepted = accept(log_probs, by_name, SIX, np.arange(COUNT), seed=1)
    for index, joint in enumerate(SIX):
        weights = np.ones(COUNT)
        for (name, exponent), label in zip(by_name.items(), joint.labels, strict=True):
            weights *= np.exp(log_probs[name][:, label].astype(np.float64)) ** exponent
        _check_law(GRID[accepted[index]], weights)


def _check_law(strengths: np.ndarray, weights: np.ndarray) -> None:
    """Within four standard errors of the law whose density on GRID is proportional to `weights`, the rate being their mean."""
    z, law = weights.mean(), weights / weights.sum()
    assert abs(len(strengths) / COUNT - z) < 4 * np.sqrt(z * (1 - z) / COUNT)
    shares = law.reshape(10, -1).sum(axis=1)
    found = np.histogram(strengths, 10, (0, 1))[0] / len(strengths)
    assert np.all(np.abs(found - shares) <= 4 * np.sqrt(shares * (1 - shares) / len(strengths)) + 3 / len(strengths))
    mean = law @ GRID
    assert abs(strengths.mean() - mean) < 4 * np.sqrt(law @ (GRID - mean) ** 2 / len(strengths))


def test_draws_are_keyed_by_seed_and_sample() -> None:
    """So a sample is accepted or not, whatever else is in the pool."""
    log_probs, ids = {"hue": hue_log_probs(GRID[:400] * 30)}, np.arange(400)
    for exponent in (1.0, 2.0):
        whole = accept(log_probs, {"hue": exponent}, ONE, ids, seed=3)
        part = accept({"hue": log_probs["hue"][100:]}, {"hue": exponent}, ONE, ids[100:], seed=3)
        np.testing.assert_array_equal(whole[:, 100:], part)
        assert not np.array_equal(whole, accept(log_probs, {"hue": exponent}, ONE, ids, seed=4))


class _Source:
    """Uniform strengths, in prompts' turn; knows how many were asked for."""

    def __init__(self, log_probs: float | None = None) -> None:
        self.asked: list[int] = []
        self._constant = log_probs

    def __call__(self, count: int) -> Measured:
        self.asked.append(count)
        strength = np.random.default_rng(5).uniform(size=count)
        log_probs = hue_log_probs(strength)
        if self._constant is not None:
            log_probs[:, 1] = self._constant
        return without_images(strength, np.zeros(count), {"hue": log_probs}, prompts=("a", "b"))


def _grow(source: _Source, exponent: float, *, wanted: int = 200, limit: int = 4000) -> tuple[Pool, list[str]]:
    said: list[str] = []
    pool = grow_pool(
        source, {"hue": exponent}, ONE, unit=4, worth=fewest(2), wanted=wanted, limit=limit, seed=0, say=said.append
    )
    return pool, said


def test_the_pool_grows_until_every_class_has_enough() -> None:
    """In few rounds, all a multiple of classes × prompts, and not far beyond what is needed."""
    source = _Source()
    pool, said = _grow(source, 4.0)
    assert pool.accepted.sum(axis=1).min() >= 200 and len(pool.samples) == source.asked[-1] < 1000
    assert source.asked[0] == 200 and len(source.asked) == len(said) + 1 <= 4 and all(n % 4 == 0 for n in source.asked)
    assert f"going on to {source.asked[1]}" in said[0] and "wanted: 200" in said[0]
    np.testing.assert_allclose(pool.rates, np.exp(log_tilts(pool.samples.class_log_probs, {"hue": 4.0}, ONE)).mean(1))


def test_the_pool_ends_at_its_limit() -> None:
    pool, _ = _grow(_Source(), 4.0, limit=302)
    assert len(pool.samples) == 300 and pool.accepted.sum(axis=1).min() < 200
    smallest, _ = _grow(_Source(), 4.0, limit=1)
    assert len(smallest.samples) == 4  # every class and prompt once


def test_a_class_out_of_reach_does_not_make_the_pool_grow_and_says_what_it_takes() -> None:
    """p̂ = e^-3 at λ = 4: one sample in 162,755; 22 of them take 3.6 million."""
    pool, _ = _grow(source := _Source(-3.0), 4.0)
    assert max(source.asked) < 4000
    text = shortage("colourful", pool, 1, num_prompts=2)
    assert text.startswith(
        f"class 'colourful': 0 of {len(pool.samples)} pre-trained samples were accepted (rate 6.1e-06)"
    )
    assert "expected about 22" in text and text.endswith("it takes about 3.6e+06 pre-trained samples")


def test_joint_classes_are_in_the_order_in_which_samples_ask_for_them() -> None:
    assert [JointClass((0,), "grey"), JointClass((1,), "colourful")] == ONE
    assert [joint.labels for joint in SIX] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2)]
    assert SIX[3].name == "hue colourful, level middle"
