"""The weights of candidates, the choice among them and the share of pre-trained ones, by hand and by independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm

from ctrl_ray.candidates.weights import (
    SHARES,
    candidate_log_weights,
    choose_share,
    log_tilts,
    num_pre_trained,
    predicted_efficiency,
    selection_noise,
)
from ctrl_ray.evaluation.certificate import Paths, effective_sample_size
from tests.unit.candidates.resampling import Kind, law_of_the_chosen


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(8, 1 / 16, 1), (16, 1 / 16, 1), (64, 3 / 16, 12), (8, 0.5, 4), (2, 0.9, 1)]
)
def test_at_least_one_candidate_is_pre_trained_and_not_all(count: int, share: float, expected: int) -> None:
    assert num_pre_trained(count, share) == expected


def test_a_weight_is_the_targets_over_the_mixtures() -> None:
    """p w = target, for densities that are written down; bounded where the policy never goes."""
    x = np.linspace(-4, 4, 9)
    pre_trained, policy, tilts = norm.pdf(x), norm.pdf(x, 2, 0.5), np.log(expit(x))
    weights = np.exp(candidate_log_weights(tilts, np.log(policy / pre_trained), 0.25))
    np.testing.assert_allclose(weights * (0.25 * pre_trained + 0.75 * policy), pre_trained * expit(x))
    assert np.all(weights <= expit(x) / 0.25 * (1 + 1e-12))
    assert weights[0] == pytest.approx(4 * expit(-4), rel=1e-6)  # the policy's density there is nothing
    assert candidate_log_weights(tilts, None, 1.0) is tilts


def test_tilts_of_several_controls_and_null_labels() -> None:
    beliefs = {"size": np.log([[0.5, 0.5], [0.25, 0.75]]), "hue": np.log([[0.1, 0.2, 0.7], [0.2, 0.2, 0.6]])}
    labels = np.array([[0, 3, 1], [1, 2, 0]])  # hue 3 is null; nobody believes anything of the last control
    found = log_tilts(beliefs, labels, {"size": 2.0, "hue": 0.5, "other": 4.0})
    np.testing.assert_allclose(found, [2 * math.log(0.5), 2 * math.log(0.75) + 0.5 * math.log(0.6)])


def test_the_choice_is_in_proportion_to_the_weights() -> None:
    """Whatever their scale; and the same again for the same seeds."""
    log_weights = np.log([1.0, 2.0, 5.0]) - 800
    chosen = [int(np.argmax([w + selection_noise(seed, j) for j, w in enumerate(log_weights)])) for seed in range(6000)]
    expected = np.array([1, 2, 5]) / 8
    found = np.bincount(chosen, minlength=3) / 6000
    assert np.all(np.abs(found - expected) < 4 * np.sqrt(expected * (1 - expected) / 6000))
    assert selection_noise(3, 1) == selection_noise(3, 1) != selection_noise(3, 2)


def test_the_predicted_efficiency_is_that_of_a_large_group() -> None:
    """A policy on one side of a target with two: best with many pre-trained ones, worst alone."""
    rng, count = np.random.default_rng(0), 200_000
    pre_trained, policy = rng.normal(size=count), rng.normal(1.0, 1.0, size=count)

    def paths(x: np.ndarray) -> Paths:  # the target: N(0, 1) times cosh x, halves at ±1
        return Paths(np.logaddexp(x, -x) - math.log(2) - 0.5, x - 0.5)

    share = 0.25
    predicted = predicted_efficiency(paths(policy), paths(pre_trained), share)
    group = np.concatenate([pre_trained[: count // 4], policy[: 3 * count // 4]])
    log_weights = candidate_log_weights(paths(group).log_tilts, paths(group).log_ratios, share)
    assert predicted == pytest.approx(effective_sample_size(log_weights) / count, rel=0.03)
    x = np.linspace(-12, 12, 4001)
    target, mixture = norm.pdf(x, 1) / 2 + norm.pdf(x, -1) / 2, share * norm.pdf(x) + (1 - share) * norm.pdf(x, 1)
    assert predicted == pytest.approx(1 / float(np.sum(target**2 / mixture) * (x[1] - x[0])), rel=0.03)
    assert choose_share(paths(policy), paths(pre_trained)).share == max(SHARES)


def test_a_policy_that_is_the_target_wants_few_pre_trained_paths() -> None:
    rng = np.random.default_rng(0)
    pre_trained, policy = rng.normal(size=4000), rng.normal(1.0, 1.0, size=4000)
    choice = choose_share(*(Paths(x - 0.5, x - 0.5) for x in (policy, pre_trained)))  # the target is N(1, 1)
    assert choice.share == min(SHARES) and 0.8 < choice.efficiency <= 1


def test_the_chosen_ones_law_tends_to_the_tilt_as_the_integral_says() -> None:
    """½N(±2, ½²) with a logistic reward, of 1, 4 and 16 pre-trained candidates."""
    rng, edges, images = np.random.default_rng(0), np.linspace(-4, 4, 9), 6000
    grid = np.linspace(-5, 5, 801)
    base = norm.pdf(grid, 2, 0.5) + norm.pdf(grid, -2, 0.5)
    base /= base.sum()
    bins = np.digitize(grid, edges)
    tilt = np.bincount(bins, base * expit(grid), minlength=10) * 2  # Z is ½
    distances = []
    for count in (1, 4, 16):
        law = law_of_the_chosen([Kind(count, base, expit(grid), bins)], 10)
        assert law.sum() == pytest.approx(1, abs=1e-4)
        x = rng.normal(rng.choice([-2.0, 2.0], size=(images, count)), 0.5)
        scores = np.log(expit(x)) + rng.gumbel(size=x.shape)
        found = np.bincount(np.digitize(x[np.arange(images), scores.argmax(1)], edges), minlength=10) / images
        assert np.all(np.abs(found - law) < 4 * np.sqrt(law * (1 - law) / images) + 1e-4)
        distances.append(0.5 * float(np.abs(law - tilt).sum()))
    assert distances[0] == pytest.approx(0.37, abs=0.01) and distances[1] < 0.12 and distances[2] < 0.025
