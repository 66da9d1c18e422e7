"""The numbers of a report: `summary.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

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
) -> dict[str, Any]:
    """The content of `summary.json`: {"before": ..., "after": ..., "changes": ..., "kl_noise_floor": ...} of finite numbers
    or null; the first, the third and the last where they are known.

    `changes` holds, for the same samples before and after, the paired difference of accuracy and prompt_fidelity
    ({"mean", "standard_error", "num_pairs"}), and `diversity_ratio`, after / before.
    """
    summary: dict[str, Any] = {} if before is None else {"before": summary_of(before.judged)}
    summary["after"] = {**summary_of(after.judged), **(certificate or {})}
    if before is not None:
        summary["changes"] = _changes(before, after)
    if kl_noise_floor is not None:
        summary["kl_noise_floor"] = kl_noise_floor
    return _finite(summary)


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
    right_before, right_after = _right(before), _right(after)
    same_labels = np.array_equal(before.samples.labels, after.samples.labels)
    if right_before is not None and right_after is not None and same_labels:
        changes["accuracy"] = paired_difference(right_before, right_after)._asdict()
    return changes


def _right(evaluation: Evaluation) -> np.ndarray | None:
    """Whether each sample hit its class, for a single judged control and the rows that ask for one."""
    controls, classes = evaluation.judged["controls"], evaluation.judged["per_sample"]["classes"]
    if len(controls) != 1 or len(classes) != 1:
        return None
    [(name, measured)] = classes.items()
    labels = evaluation.samples.labels[:, 0]
    asked = labels < len(controls[name]["classes"])
    return (labels == measured)[asked]


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None, arrays and tuples as lists: what strict JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
