"""The numbers of a report: `summary.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ctrl_ray.evaluation.findings import not_learned
from ctrl_ray.evaluation.judging import summary_of
from ctrl_ray.evaluation.metrics import paired_difference
from ctrl_ray.evaluation.samples import EvaluationSamples


class Evaluation(NamedTuple):
    """What was judged, with the samples it was judged on."""

    judged: Mapping[str, Any]
    """The answer of `judge`."""
    samples: EvaluationSamples


def make_summary(
    before: Evaluation | None,
    after: Evaluation,
    kl_noise_floor: float | None = None,
    certificate: Mapping[str, Any] | None = None,
    method: str | None = None,
    training_method: str = "ctrl",
) -> dict[str, Any]:
    """The content of `summary.json`: {"before": ..., "after": ..., "changes": ..., "kl_noise_floor": ..., "method": ...,
    "training_method": ...} of finite numbers or null; all but "after" where they are known, the last where it is not CTRL.

    method: of `ctrl_ray.baselines`, where nothing was trained.

    `changes` holds, for the same samples before and after, the paired difference of accuracy (the mean over controls, and
    `accuracy/CONTROL`), prompt_fidelity and `metric_names.SCORES` ({"mean", "standard_error", "num_pairs"}), and
    `diversity_ratio`, after / before.
    `after` has the certificate's numbers and `not_learned` beside those of `judge`, where they are known.
    """
    summary: dict[str, Any] = {} if before is None else {"before": summary_of(before.judged)}
    summary["after"] = {**summary_of(after.judged), **(certificate or {})}
    if before is not None:
        summary["changes"] = _changes(before, after)
        summary["after"]["not_learned"] = not_learned_of(before, after)
    if kl_noise_floor is not None:
        summary["kl_noise_floor"] = kl_noise_floor
    if method is not None:
        summary["method"] = method
    if training_method != "ctrl":
        summary["training_method"] = training_method
    return _finite(summary)


def baseline_of(summary: Mapping[str, Any]) -> str | None:
    """The baseline that a summary is of, trained or not; None: CTRL."""
    found: str | None = summary.get("method", summary.get("training_method"))
    return found


def _changes(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    changes: dict[str, Any] = {"diversity_ratio": None}
    if before.judged["diversity"] and after.judged["diversity"] is not None:
        changes["diversity_ratio"] = after.judged["diversity"] / before.judged["diversity"]
    same = np.array_equal(before.samples.sample_ids, after.samples.sample_ids)
    if not same or before.samples.prompts != after.samples.prompts:
        return changes
    was, now = (evaluation.judged["per_sample"]["prompt_scores"] for evaluation in (before, after))
    if was is not None and now is not None:
        changes["prompt_fidelity"] = paired_difference(was, now)._asdict()
    scored = after.judged["per_sample"].get("scores", {})
    for name, earlier in before.judged["per_sample"].get("scores", {}).items():
        both_known = np.isfinite(earlier) & np.isfinite(scored.get(name, np.nan))
        if both_known.any():
            changes[name] = paired_difference(earlier[both_known], scored[name][both_known])._asdict()
    if np.array_equal(before.samples.labels, after.samples.labels):
        was_right, now_right = _right(before), _right(after)
        both = [name for name in now_right if name in was_right]
        changes |= {f"accuracy/{name}": paired_difference(was_right[name], now_right[name])._asdict() for name in both}
        if both and (len(both) == 1 or all(len(now_right[name]) == len(after.samples) for name in both)):
            means = [np.mean([right[name] for name in both], axis=0) for right in (was_right, now_right)]
            changes["accuracy"] = paired_difference(*means)._asdict()
    return changes


def _right(evaluation: Evaluation) -> dict[str, np.ndarray]:
    """Judged control to whether each sample that asks for one of its classes hit it."""
    controls, classes = evaluation.judged["controls"], evaluation.judged["per_sample"]["classes"]
    right = {}
    for column, (name, control) in enumerate(controls.items()):
        if name in classes:
            labels = evaluation.samples.labels[:, column]
            right[name] = (labels == classes[name])[labels < len(control["classes"])]
    return right


def not_learned_of(before: Evaluation, after: Evaluation) -> list[dict[str, Any]]:
    """What the policy has not learned, by the two evaluations (`ctrl_ray.evaluation.findings`)."""
    classes = {name: control["classes"] for name, control in after.judged["controls"].items()}
    true_before, true_after = (part.judged["per_sample"]["classes"] for part in (before, after))
    return not_learned(classes, before.samples, after.samples, true_before, true_after)


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, arrays and tuples as lists: what strict JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
