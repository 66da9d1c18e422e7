"""What a policy has not learned is said, with numbers worked out by hand; what it has learned is not."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ctrl_ray.evaluation.findings import Comparison, compare, findings_text, not_learned
from ctrl_ray.evaluation.samples import EvaluationSamples

CLASSES = {"size": ("small", "large"), "colour": ("pale", "vivid")}


def _samples(labels: np.ndarray, log_probs: dict[str, np.ndarray] | None = None) -> EvaluationSamples:
    count = len(labels)
    return EvaluationSamples(
        images=np.zeros((count, 1, 1, 3), dtype=np.uint8),
        prompts=("a circle",) * count,
        labels=labels,
        kl=np.zeros(count),
        class_log_probs=log_probs or {},
        sample_ids=np.arange(count),
    )


def _labels(count: int) -> np.ndarray:
    """All four combinations, in turn."""
    rows = np.arange(count)
    return np.stack([rows % 2, rows // 2 % 2], axis=1)


def _beliefs(classes: np.ndarray, right: float = 0.9) -> np.ndarray:
    """(n, 2) log p: `right` of the class that is true."""
    return np.log(np.where(np.eye(2)[classes] == 1, right, 1 - right))


def test_pairs_are_compared_row_by_row() -> None:
    """Four pairs, differences 1, 1, 0, 0: mean 1/2, error sqrt(1/3) / 2. A fifth asks for nothing."""
    before, after = np.eye(2)[[1, 1, 0, 0, 0]], np.eye(2)[[0, 0, 0, 0, 0]]
    asked = np.array([0, 0, 0, 0, 2])
    found = compare(before, asked, after, asked, paired=True)
    assert found == pytest.approx((0.5, 1.0, 0.5, np.sqrt(1 / 3) / 2))


def test_independent_samples_are_compared_for_the_same_classes() -> None:
    """After, three quarters ask for class 0. Before, class 0 is hit in 1 of 2, class 1 in 2 of 2: 3/4 · 1/2 + 1/4 · 1."""
    after, asked = np.eye(2)[[0, 0, 0, 1, 1, 1, 0, 1]], np.array([0, 0, 0, 0, 0, 0, 1, 1])
    before, asked_before = np.eye(2)[[0, 1, 1, 1]], np.array([0, 0, 1, 1])
    found = compare(before, asked_before, after, asked, paired=False)
    error_after = np.std([1, 1, 1, 0, 0, 0, 0, 1], ddof=1) / np.sqrt(8)
    assert found == pytest.approx((0.625, 0.5, -0.125, np.hypot(error_after, 0.75 * np.sqrt(0.5) / np.sqrt(2))))


def test_a_model_that_was_asked_for_nothing_is_compared_with_all_its_samples() -> None:
    """One of four is of class 0: with three quarters asking for it, each scores 3/4 or 1/4."""
    after, asked = np.eye(2)[[0, 0, 0, 1]], np.array([0, 0, 0, 1])
    before, nothing = np.eye(2)[[0, 1, 1, 1]], np.full(4, 2)
    found = compare(before, nothing, after, asked, paired=False)
    assert found == pytest.approx((0.375, 1.0, 0.625, 0.25 / 2))
    assert compare(before, np.array([0, 1, 1, 1]), after, asked, paired=False) is None  # one sample has no error
    assert compare(before, nothing, after, np.array([0, 2, 2, 2]), paired=False) is None


def test_three_standard_errors_are_the_limit() -> None:
    assert Comparison(0.5, 0.81, 0.31, 0.1).above and not Comparison(0.5, 0.79, 0.29, 0.1).above
    assert not Comparison(1.0, 1.0, 0.0, 0.0).above


def _found(colour_right: float = 0.5) -> list[dict]:
    """400 pairs: size is hit by all, against half; colour by `colour_right`, against half."""
    labels, rng = _labels(400), np.random.default_rng(0)
    chance = {name: rng.permutation(400) % 2 for name in CLASSES}
    colour = np.where(np.arange(400) < 400 * colour_right, labels[:, 1], 1 - labels[:, 1])
    true_after = {"size": labels[:, 0], "colour": colour}
    parts = [_samples(labels, {n: _beliefs(t) for n, t in true.items()}) for true in (chance, true_after)]
    return not_learned(CLASSES, *parts, chance, true_after)


def test_a_control_at_chance_is_said_and_one_above_is_not() -> None:
    """Accuracy by hand: the share of the pairs that were right, and the spread of the differences."""
    found = _found()
    assert {entry["control"] for entry in found} == {"colour"}
    assert [entry["class"] for entry in found] == [None, "pale", "vivid"]
    accuracy = found[0]["accuracy"]
    assert accuracy["after"] == 0.5 and abs(accuracy["difference"]) < 0.1
    assert accuracy["standard_error"] == pytest.approx(np.sqrt(0.5 / 400), rel=0.1) and accuracy["above"] is False
    [sentence] = findings_text(found)
    assert sentence.startswith("colour: accuracy 0.500 after, 0.")
    assert (
        "log p(y|x,c) -1.204 after, -1." in sentence and ": not above the pre-trained model. Try: a larger" in sentence
    )
    for words in ("guidance_strength of colour", "num_updates", "smaller kl_coef", "calibration of the classifier"):
        assert words in sentence
    assert _found(colour_right=0.9) == []


def test_a_class_alone_is_said() -> None:
    """Colour is hit where pale was asked for, never where vivid was."""
    labels = _labels(400)
    chance = {"colour": np.arange(400) // 4 % 2, "size": np.arange(400) // 8 % 2}
    parts = [_samples(labels) for _ in range(2)]
    found = not_learned(CLASSES, *parts, chance, {"colour": np.zeros(400, dtype=int), "size": labels[:, 0]})
    assert [(entry["control"], entry["class"]) for entry in found] == [("colour", None), ("colour", "vivid")]
    assert found[1]["accuracy"]["after"] == 0.0 and found[1]["log_prob"] is None
    [sentence] = findings_text(found[1:])
    assert sentence.startswith("colour, class vivid: accuracy 0.000 after, 0.500 before (difference -0.500 ± 0.035):")


def test_many_classes_are_one_sentence() -> None:
    part = {"before": 0.5, "after": 0.55, "difference": 0.05, "standard_error": 0.03, "above": False}
    found = [{"control": "size", "class": f"c{i}", "accuracy": part, "log_prob": None} for i in range(9)]
    [sentence] = findings_text(found)
    assert "class c3: " in sentence and "class c4" not in sentence and "; and 5 more classes: not above" in sentence
    assert "more samples" in sentence  # 0.05 ± 0.03 may be a rise


@pytest.mark.parametrize("missing", ["before", "after"])
def test_nothing_is_said_of_what_only_one_side_measures(missing: str) -> None:
    labels = _labels(40)
    true = np.arange(40) // 4 % 2
    known, without = _samples(labels, {"colour": _beliefs(true)}), _samples(labels)
    oracle: list[dict] = [{"colour": true}, {"colour": true}]
    parts = [known, known]
    assert len(not_learned(CLASSES, *parts, *oracle)) == 3
    index = ["before", "after"].index(missing)
    parts[index], oracle[index] = without, {}
    assert not_learned(CLASSES, *parts, *oracle) == []


def test_what_to_try_depends_on_belief_and_truth() -> None:
    up = {"before": 0.3, "after": 0.8, "difference": 0.5, "standard_error": 0.03, "above": True}
    level = {**up, "after": 0.3, "difference": 0.0, "above": False}
    entry = {"control": "size", "class": None}
    [believed] = findings_text([{**entry, "accuracy": level, "log_prob": up}])
    assert "log p" not in believed and "Try: look at the accuracy and calibration" in believed
    assert "believes in what the oracle does not find" in believed
    [doubted] = findings_text([{**entry, "accuracy": up, "log_prob": level}])
    assert "accuracy 0" not in doubted and "does not believe in what the oracle finds" in doubted
    [full] = findings_text([{**entry, "accuracy": {**level, "before": 0.97, "after": 0.97}, "log_prob": None}])
    assert "Try: nothing, unless" in full and "guidance_strength" not in full


def test_other_noise_or_prompts_are_not_pairs() -> None:
    """Ten samples against the same in another order: the error is that of independent ones."""
    labels = np.zeros((10, 2), dtype=np.int64)
    true = {"size": np.arange(10) % 2}
    after = _samples(labels)
    pairs = not_learned(CLASSES, _samples(labels), after, true, true)
    assert pairs[0]["accuracy"]["standard_error"] == 0.0
    other = dataclasses.replace(_samples(labels), sample_ids=np.arange(10) + 10)
    [whole, _] = not_learned(CLASSES, other, after, true, true)
    assert whole["accuracy"]["standard_error"] == pytest.approx(np.std(true["size"], ddof=1) * np.sqrt(2 / 10))


def test_a_baseline_is_not_told_to_train_longer() -> None:
    """What CTRL's settings would change is no advice for a method that has none of them."""
    level = {"before": 0.3, "after": 0.3, "difference": 0.0, "standard_error": 0.02, "above": False}
    entry = {"control": "size", "class": None, "accuracy": level, "log_prob": level}
    [ours], [theirs] = findings_text([entry]), findings_text([entry], "dps")
    assert "a larger guidance_strength of size, more updates" in ours
    assert "guidance_strength" not in theirs and "other options of method dps, or another method" in theirs
