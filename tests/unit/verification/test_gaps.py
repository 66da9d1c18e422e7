"""Certificates of joint classes, with policies whose gap is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ctrl_ray.verification.gaps import certify_classes
from ctrl_ray.verification.measured import Measured
from ctrl_ray.verification.target import joint_classes
from tests.unit.verification.samples import HUE, hue_log_probs, without_images

EXPONENT = 2.0
CLASSES = joint_classes({"hue": HUE})
COUNT = 4000


def _pre_trained(strengths: dict[str, np.ndarray]) -> Measured:
    """Prompts in turn, each with its own strengths, equally many."""
    strength = np.stack(list(strengths.values()), axis=1).ravel()
    log_probs = {"hue": hue_log_probs(strength)}
    return without_images(strength, np.zeros(len(strength)), log_probs, prompts=tuple(strengths))


def _policy(log_weights: np.ndarray, prompts: tuple[str, ...], seed: int = 0) -> Measured:
    """Samples of both classes with these log w, whatever their images are."""
    count = len(log_weights)
    labels = np.random.default_rng(seed).permutation(np.arange(count) % 2)
    strength = np.random.default_rng(seed).uniform(size=count)
    log_probs = hue_log_probs(strength)
    log_ratio = EXPONENT * log_probs[np.arange(count), labels].astype(np.float64) - log_weights
    return without_images(strength, labels, {"hue": log_probs}, prompts=prompts, log_ratio=log_ratio)


def _certify(pool: Measured, tuned: Measured) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    return certify_classes(pool, tuned, {"hue": EXPONENT}, CLASSES)


def test_log_z_is_that_of_each_prompt() -> None:
    """A policy whose log w is log Z(c, y) − ½: a gap of ½ nat and effective sample size 1 in every class, although the prompts'
    Z differ by a factor of fifteen. Pooled over prompts, log Z would be higher by 0.7 nat."""
    grid = (np.arange(COUNT) + 0.5) / COUNT
    strengths = {"bright": 0.5 + grid / 2, "dull": grid / 2}
    log_z = {
        name: np.log(np.exp(EXPONENT * hue_log_probs(each).astype(np.float64)).mean(axis=0))
        for name, each in strengths.items()
    }
    assert abs(log_z["bright"][1] - log_z["dull"][1]) > 2
    tuned = _policy(np.zeros(600), ("bright", "dull"))
    own = np.array([log_z[prompt][label] for prompt, label in zip(tuned.prompts, tuned.labels[:, 0], strict=True)])
    classes, whole = _certify(_pre_trained(strengths), _policy(own - 0.5, ("bright", "dull")))
    for found in (*classes, whole):
        assert found["gap"] == pytest.approx(0.5, abs=1e-6) and found["ess"] == pytest.approx(1, abs=1e-6)
        assert found["log_z"] - found["objective"] == pytest.approx(found["gap"])
        assert not found["log_z_pooled"] and found["bounds"][1] is None
    mean = {label: np.mean([log_z[name][label] for name in log_z]) for label in (0, 1)}
    assert classes[1]["log_z"] == pytest.approx(mean[1], abs=0.05)  # as many samples of each prompt, about
    assert np.logaddexp(log_z["bright"][1], log_z["dull"][1]) - np.log(2) > mean[1] + 0.7


def test_log_z_is_pooled_where_prompts_have_few_samples() -> None:
    """Said, for it is an upper bound; and so is a log Z that rests on few samples even then."""
    rng = np.random.default_rng(0)
    few = {f"{index}": rng.uniform(size=25) for index in range(40)}
    tuned = _policy(np.full(400, -1.5), tuple(few))
    classes, whole = _certify(_pre_trained(few), tuned)
    tilts = np.exp(EXPONENT * hue_log_probs(np.concatenate(list(few.values()))).astype(np.float64))
    assert whole["log_z_pooled"] and all(found["log_z_pooled"] for found in classes)
    for label, found in enumerate(classes):
        assert found["log_z"] == pytest.approx(np.log(tilts[:, label].mean()), abs=1e-6)
        assert not found["too_wide"]
    dull = {"a": np.concatenate([np.full(500, 0.01), [0.99]])}
    classes, _ = _certify(_pre_trained(dull), _policy(np.full(400, -1.5), ("a",)))
    assert [found["too_wide"] for found in classes] == [False, True]


@pytest.mark.full
def test_the_error_is_that_of_repeats() -> None:
    """Standard deviation of the gap over independent repeats, within a quarter."""
    found = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        strengths = {name: rng.uniform(size=300) for name in ("a", "b")}
        found.append(_certify(_pre_trained(strengths), _policy(rng.normal(-1.5, 0.5, 300), ("a", "b"), seed))[1])
    errors = [each["gap_standard_error"] for each in found]
    assert np.std([each["gap"] for each in found]) == pytest.approx(np.mean(errors), rel=0.25)
