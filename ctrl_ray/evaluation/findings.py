"""What a policy has not learned: controls and classes that stand no better than the pre-trained model does, and what to try."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ctrl_ray.evaluation.metrics import mean_standard_error, paired_difference
from ctrl_ray.evaluation.samples import EvaluationSamples

ENOUGH = 3.0
"""Standard errors by which the policy has to be above the pre-trained model."""
_MEASURES = {"accuracy": "accuracy", "log_prob": "log p(y|x,c)"}
_NOTHING_TO_GAIN = 0.9
_CLASSES_NAMED = 4


class Comparison(NamedTuple):
    """One number of the policy's samples beside the same of the pre-trained model's."""

    before: float
    after: float
    difference: float
    standard_error: float
    """Of the difference."""

    @property
    def above(self) -> bool:
        """Whether the policy's is above the pre-trained model's by `ENOUGH` standard errors."""
        return self.difference > ENOUGH * self.standard_error


def compare(
    before: np.ndarray, asked_before: np.ndarray, after: np.ndarray, asked_after: np.ndarray, *, paired: bool
) -> Comparison | None:
    """The mean score of the class asked for, before and after; rows of `after` with a null label do not count.

    Pairs are compared row by row. Independent samples are compared for the same classes in the same shares: by the rows of
    `before` that ask for them, or, where a class has none, by its rows with a null label.

    Args:
        before: (m, K) score of every class: 1 for the true one and 0 for the others, or log p.
        asked_before: (m,) the class asked for; K is the null label.
        after: (n, K).
        asked_after: (n,).
        paired: Row i of both is one pair (m = n), and asks for the same class.

    Returns:
        None where fewer than two samples leave no error.
    """
    rows = np.flatnonzero(asked_after < after.shape[1])
    if len(rows) < 2:
        return None
    asked = asked_after[rows]
    now = after[rows, asked]
    if paired:
        was = before[rows, asked]
        change = paired_difference(was, now)
        return Comparison(float(was.mean()), float(now.mean()), change.mean, change.standard_error)
    baseline = _baseline(before, asked_before, np.bincount(asked, minlength=after.shape[1]) / len(asked))
    if baseline is None:
        return None
    mean, error = baseline
    return Comparison(
        mean, float(now.mean()), float(now.mean()) - mean, float(np.hypot(mean_standard_error(now), error))
    )


def _baseline(scores: np.ndarray, asked: np.ndarray, shares: np.ndarray) -> tuple[float, float] | None:
    """Mean score for the classes in the shares (K,), with its standard error; None where there is no sample for it."""
    parts = [(share, scores[asked == label, label]) for label, share in enumerate(shares) if share > 0]
    if all(len(values) > 1 for _, values in parts):
        errors = [share * mean_standard_error(values) for share, values in parts]
        return float(sum(share * values.mean() for share, values in parts)), float(np.linalg.norm(errors))
    free = scores[asked == len(shares)] @ shares
    return (float(free.mean()), mean_standard_error(free)) if len(free) > 1 else None


def not_learned(
    controls: Mapping[str, Sequence[str]],
    before: EvaluationSamples,
    after: EvaluationSamples,
    true_before: Mapping[str, np.ndarray],
    true_after: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """Of every control, and of each of its classes, what is measured on both sides and not above by `ENOUGH` standard errors.

    Args:
        controls: Name to the names of its classes, in the order of the labels' columns.
        before: Samples of the pre-trained model, which need not ask for anything.
        after: The policy's.
        true_before: Control to (N,) true classes; a control that no oracle judges is missing.
        true_after: The same of `after`.

    Returns:
        {"control", "class" (None: all of them), "accuracy", "log_prob"}, ready for JSON, the last two with the fields of
        `Comparison` and `above`, or None where a side is not measured; only such of which one is not above.
    """
    same = np.array_equal(before.sample_ids, after.sample_ids) and before.prompts == after.prompts
    found = []
    for column, (name, classes) in enumerate(controls.items()):
        asked_before, asked_after = before.labels[:, column], after.labels[:, column]
        paired = same and np.array_equal(asked_before, asked_after)
        sides = {
            "accuracy": [np.eye(len(classes))[true[name]] for true in (true_before, true_after) if name in true],
            "log_prob": [
                part.class_log_probs[name].astype(np.float64)
                for part in (before, after)
                if name in part.class_log_probs
            ],
        }
        for label, class_name in [(None, None), *enumerate(classes)]:
            asked = asked_after if label is None else np.where(asked_after == label, asked_after, len(classes))
            entry = {
                measure: compare(both[0], asked_before, both[1], asked, paired=paired) if len(both) == 2 else None
                for measure, both in sides.items()
            }
            if any(part is not None and not part.above for part in entry.values()):
                numbers = {m: None if p is None else {**p._asdict(), "above": p.above} for m, p in entry.items()}
                found.append({"control": name, "class": class_name, **numbers})
    return found


def findings_text(found: Sequence[Mapping[str, Any]], method: str | None = None) -> list[str]:
    """The answer of `not_learned` in sentences, with what to try: one for a control of which all classes together are not
    above, else one for its classes that are not. method: a baseline, whose options are others than CTRL's."""
    whole = {entry["control"]: entry for entry in found if entry["class"] is None}
    sentences = [_sentence([entry], method) for entry in whole.values()]
    for name in dict.fromkeys(entry["control"] for entry in found if entry["control"] not in whole):
        sentences.append(_sentence([entry for entry in found if entry["control"] == name], method))
    return sentences


def _sentence(entries: Sequence[Mapping[str, Any]], method: str | None) -> str:
    """Of entries of one control."""
    name = entries[0]["control"]
    parts = [
        ("" if entry["class"] is None else f"class {entry['class']}: ") + _numbers(entry)
        for entry in entries[:_CLASSES_NAMED]
    ]
    more = len(entries) - len(parts)
    head = f"{name}: " if entries[0]["class"] is None else f"{name}, "
    rest = f"; and {more} more classes" if more else ""
    return f"{head}{'; '.join(parts)}{rest}: not above the pre-trained model. Try: {_advice(name, entries, method)}."


def _numbers(entry: Mapping[str, Any]) -> str:
    """What is not above."""
    return " and ".join(
        f"{words} {part['after']:.3f} after, {part['before']:.3f} before (difference {part['difference']:+.3f} ± "
        f"{part['standard_error']:.2g})"
        for measure, words in _MEASURES.items()
        if (part := entry[measure]) is not None and not part["above"]
    )


def _advice(name: str, entries: Sequence[Mapping[str, Any]], method: str | None) -> str:
    """By what is above and what is not."""
    both = [(entry["accuracy"], entry["log_prob"]) for entry in entries]
    if all(truth is not None and truth["before"] >= _NOTHING_TO_GAIN for truth, _ in both):
        return "nothing, unless it has to be better still; the pre-trained model draws it without being asked"
    look = f"look at the accuracy and calibration of the classifier of {name} on held-out images"
    push = f"a larger guidance_strength of {name}, more updates (num_updates), a smaller kl_coef (for every control)"
    if method is not None:
        push = f"other options of method {method}, or another method"
    if any(truth and belief and belief["above"] and not truth["above"] for truth, belief in both):
        words = [f"{look}, for it believes in what the oracle does not find", push]
    elif any(truth and belief and truth["above"] and not belief["above"] for truth, belief in both):
        words = [f"{look}, for it does not believe in what the oracle finds", push]
    else:
        words = [push, look]
    measured = [part for pair in both for part in pair if part is not None and not part["above"]]
    if any(part["difference"] > part["standard_error"] for part in measured):
        words.append("more samples, which tell a smaller difference from chance (evaluation.final_num_samples)")
    return "; ".join(words)
