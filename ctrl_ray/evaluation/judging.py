"""Judge samples by who measures the truth: the controls' oracles, never the classifier that was the reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import DataError
from ctrl_ray.evaluation import metrics
from ctrl_ray.evaluation.metric_names import EVALUATION_METRICS
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.oracles import Oracle, load_oracle, measure

HeldOutJudge = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""Images (N, H, W, 3) uint8 and prompts to classes (N,), by a classifier that had no part in training."""
ImageScore = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""Images (N, H, W, 3) uint8 and prompts to scores (N,); NaN of an image that has none."""
PromptFidelity = ImageScore
"""How well each image shows its prompt; never NaN."""

NUM_CALIBRATION_BINS = 10


@dataclass(frozen=True, slots=True, eq=False)
class OracleLabels:
    """What one control's judge says about every sample."""

    classes: np.ndarray
    """(N,) int64: true class."""
    values: np.ndarray | None
    """(N,) float64: the oracle's number; None for a judge that names classes only."""
    judged_by: str


def judge(
    samples: EvaluationSamples,
    controls: Mapping[str, ControlConfig],
    *,
    fidelity: PromptFidelity | None = None,
    scorers: Mapping[str, ImageScore] | None = None,
    by: Literal["label", "oracle"] = "label",
    oracles: Mapping[str, Oracle] | None = None,
    judges: Mapping[str, HeldOutJudge] | None = None,
) -> dict[str, Any]:
    """Every number of an evaluation, ready for JSON but for `per_sample` (see `summary_of`).

    Args:
        samples: The decoded samples; column i of its labels belongs to the i-th of `controls`.
        controls: Name to settings; a control's oracle measures the truth.
        fidelity: Scores prompts; None leaves `prompt_fidelity` at None.
        scorers: What measures `metric_names.SCORES`, by name; a name that is missing is None.
        by: Classes within which diversity is measured: those asked for ("label", for a trained policy) or the true
            ones ("oracle", for the pre-trained model, which was not told the label).
        oracles: Oracles by control, in place of those the controls name.
        judges: Held-out classifiers for controls without an oracle.

    Returns:
        The keys of `EVALUATION_METRICS` (None where nothing could measure them, with the reason in `notes`; for several
        controls the means over those that are judged), `standard_errors` of them, `controls` (per control: accuracy,
        macro_f1, confusion, quartiles of the measured number, belief_gap, calibration) and `per_sample` arrays.
        Samples with a null label count for diversity by oracle, KL and fidelity only.

    Raises:
        DataError: Labels do not fit the controls, or an oracle answers with no number or an impossible class.
        ConfigError: A control names an oracle that cannot be found.
    """
    _check(samples, controls)
    notes: list[str] = []
    measured = {
        name: _measure(samples, name, control, (oracles or {}).get(name), (judges or {}).get(name), notes)
        for name, control in controls.items()
    }
    per_control = {
        name: _judge_control(samples, column, name, control, measured[name])
        for column, (name, control) in enumerate(controls.items())
    }
    result: dict[str, Any] = dict.fromkeys(EVALUATION_METRICS)
    errors: dict[str, float | None] = dict.fromkeys(EVALUATION_METRICS)
    for key in ("accuracy", "macro_f1", "belief_gap"):
        result[key], errors[key] = _mean_over_controls(per_control, key)
    result["joint_accuracy"], errors["joint_accuracy"] = _joint_accuracy(samples, controls, measured)
    result["diversity"], errors["diversity"] = _diversity(samples, controls, measured, by, notes)
    known_kl = samples.kl[np.isfinite(samples.kl)]
    if len(known_kl) == len(samples) and len(samples):
        result["kl"], errors["kl"] = float(known_kl.mean()), _or_none(metrics.mean_standard_error(known_kl))
    else:
        notes.append("kl: not measured; images alone do not hold the trajectory that it is summed over")
    scored = _scored(samples, scorers or {}, notes)
    for name, values in scored.items():
        known = values[np.isfinite(values)]
        result[name], errors[name] = (
            float(known.mean()) if len(known) else None,
            _or_none(metrics.mean_standard_error(known)),
        )
    scores = None
    if fidelity is None:
        notes.append("prompt_fidelity: not measured; no judge of these prompts was given")
    elif len(samples):
        same = next((name for name, scorer in (scorers or {}).items() if scorer is fidelity), None)
        scores = scored[same] if same else np.asarray(fidelity(samples.images, samples.prompts), dtype=np.float64)
        result["prompt_fidelity"] = float(scores.mean())
        errors["prompt_fidelity"] = _or_none(metrics.mean_standard_error(scores))
    result["num_samples"] = len(samples)
    return {
        **result,
        "standard_errors": errors,
        "notes": notes,
        "controls": per_control,
        "per_sample": {
            "values": {name: m.values for name, m in measured.items() if m is not None and m.values is not None},
            "classes": {name: m.classes for name, m in measured.items() if m is not None},
            "prompt_scores": scores,
            "scores": scored,
        },
    }


def summary_of(judged: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a judgement that goes into `summary.json`: all but the arrays per sample."""
    return {key: value for key, value in judged.items() if key != "per_sample"}


def evaluation_row(judged: Mapping[str, Any]) -> dict[str, float]:
    """The measured numbers as a row for `RunTracker.log("evaluation", ...)`, with `NAME/<control>` per control."""
    row = {key: judged[key] for key in EVALUATION_METRICS}
    for name, control in judged["controls"].items():
        row |= {f"{key}/{name}": control[key] for key in ("accuracy", "macro_f1", "belief_gap")}
    return {key: value for key, value in row.items() if value is not None}


def _scored(samples: EvaluationSamples, scorers: Mapping[str, ImageScore], notes: list[str]) -> dict[str, np.ndarray]:
    """(N,) float64 of each scorer; what has no score is noted."""
    if not len(samples):
        return {}
    scored = {
        name: np.asarray(scorer(samples.images, samples.prompts), dtype=np.float64) for name, scorer in scorers.items()
    }
    for name, values in scored.items():
        if not np.isfinite(values).all():
            notes.append(f"{name}: {np.sum(~np.isfinite(values))} of {len(values)} samples have none and are left out")
    return scored


def _check(samples: EvaluationSamples, controls: Mapping[str, ControlConfig]) -> None:
    if samples.labels.shape[1] != len(controls):
        raise DataError(
            f"labels have {samples.labels.shape[1]} columns for {len(controls)} controls {list(controls)}; expected one "
            "column for each"
        )
    for column, (name, control) in enumerate(controls.items()):
        labels = samples.labels[:, column]
        if len(labels) and not (labels.min() >= 0 and labels.max() <= control.num_classes):
            raise DataError(
                f"labels of control {name!r} span {labels.min()}..{labels.max()}; expected 0..{control.num_classes - 1}, "
                f"or {control.num_classes} for none"
            )
        log_probs = samples.class_log_probs.get(name)
        if log_probs is not None and log_probs.shape[1:] != (control.num_classes,):
            raise DataError(
                f"class_log_probs of control {name!r} are {log_probs.shape}; expected (N, {control.num_classes})"
            )


def _measure(
    samples: EvaluationSamples,
    name: str,
    control: ControlConfig,
    oracle: Oracle | None,
    held_out: HeldOutJudge | None,
    notes: list[str],
) -> OracleLabels | None:
    if oracle is not None or control.oracle is not None:
        return oracle_labels(name, control, samples.images, samples.prompts, oracle)
    if held_out is not None:
        return OracleLabels(
            np.asarray(held_out(samples.images, samples.prompts), dtype=np.int64), None, "held-out classifier"
        )
    notes.append(
        f"accuracy of {name}: not measured; the control has no oracle and no held-out judge was given (the classifier that "
        "was the reward does not judge itself)"
    )
    return None


def oracle_labels(
    name: str, control: ControlConfig, images: np.ndarray, prompts: Sequence[str], oracle: Oracle | None = None
) -> OracleLabels:
    """The true classes of images (N, H, W, 3) uint8 and their N prompts: by the control's oracle, or by `oracle` in its place.

    DataError where an oracle answers with no number, or (without thresholds) with no class.
    """
    if oracle is None:
        assert control.oracle is not None
        oracle = load_oracle(control.oracle)
    values = measure(oracle, images, prompts)
    if not control.thresholds:
        _check_classes(name, control, values)
    classes = np.array(
        [control.classify(value) if control.thresholds else int(value) for value in values], dtype=np.int64
    )
    return OracleLabels(classes, values, f"oracle {control.oracle or getattr(oracle, '__name__', 'of the caller')}")


def _check_classes(name: str, control: ControlConfig, values: np.ndarray) -> None:
    for index, value in enumerate(values):
        if not value.is_integer() or not 0 <= value < control.num_classes:
            raise DataError(
                f"oracle of control {name!r} gave {value} for sample {index}; expected a class in "
                f"0..{control.num_classes - 1}, because the control has no thresholds"
            )


def _judge_control(
    samples: EvaluationSamples, column: int, name: str, control: ControlConfig, measured: OracleLabels | None
) -> dict[str, Any]:
    asked = samples.labels[:, column]
    rows = np.flatnonzero(asked < control.num_classes)
    asked = asked[rows]
    result: dict[str, Any] = {
        "classes": list(control.class_names),
        "thresholds": list(control.thresholds),
        "unit": control.unit,
        "judged_by": None if measured is None else measured.judged_by,
        "num_samples": len(rows),
        **dict.fromkeys(("accuracy", "accuracy_interval", "macro_f1", "confusion", "values")),
        **dict.fromkeys(("believed_accuracy", "belief_gap", "calibration")),
        "standard_errors": dict.fromkeys(("accuracy", "macro_f1", "belief_gap")),
    }
    believed = None
    if name in samples.class_log_probs and len(rows):
        believed = np.exp(samples.class_log_probs[name][rows, asked].astype(np.float64))
        result["believed_accuracy"] = float(believed.mean())
    if measured is None or not len(rows):
        return result
    classes, num_classes = measured.classes[rows], control.num_classes
    right = asked == classes
    errors = result["standard_errors"]
    result["accuracy"] = metrics.accuracy(asked, classes)
    result["accuracy_interval"] = list(metrics.wilson_interval(int(right.sum()), len(rows)))
    result["macro_f1"] = metrics.macro_f1(asked, classes, num_classes)
    result["confusion"] = metrics.confusion_matrix(asked, classes, num_classes).tolist()
    errors["accuracy"] = _or_none(metrics.mean_standard_error(right))
    errors["macro_f1"] = _or_none(
        metrics.bootstrap_standard_error(lambda i: metrics.macro_f1(asked[i], classes[i], num_classes), len(rows))
    )
    if measured.values is not None:
        result["values"] = _values_per_class(asked, measured.values[rows], num_classes)
    if believed is not None:
        result["belief_gap"] = float(believed.mean() - right.mean())
        errors["belief_gap"] = _or_none(metrics.mean_standard_error(believed - right))
        result["calibration"] = _calibration(believed, right)
    return result


def _values_per_class(asked: np.ndarray, values: np.ndarray, num_classes: int) -> list[dict[str, Any]]:
    """Count, minimum, quartiles and maximum of the measured number for each class asked for."""
    table = []
    for index in range(num_classes):
        mine = values[asked == index]
        five = [float(q) for q in np.quantile(mine, (0, 0.25, 0.5, 0.75, 1))] if len(mine) else [None] * 5
        names = ("minimum", "lower_quartile", "median", "upper_quartile", "maximum")
        table.append({"class": index, "count": len(mine), **dict(zip(names, five, strict=True))})
    return table


def _calibration(believed: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """Equal-width bins of the believed p(class asked for): mean belief, true share, its 95 % interval, count."""
    bins = np.minimum((believed * NUM_CALIBRATION_BINS).astype(int), NUM_CALIBRATION_BINS - 1)
    table = []
    for index in np.unique(bins):
        mine = bins == index
        low, high = metrics.wilson_interval(int(right[mine].sum()), int(mine.sum()))
        table.append(
            {
                "believed": float(believed[mine].mean()),
                "measured": float(right[mine].mean()),
                "low": low,
                "high": high,
                "count": int(mine.sum()),
            }
        )
    return table


def _mean_over_controls(per_control: Mapping[str, Any], key: str) -> tuple[float | None, float | None]:
    """Mean over the judged controls; the error treats controls as independent."""
    judged = [control for control in per_control.values() if control[key] is not None]
    if not judged:
        return None, None
    errors = [control["standard_errors"][key] for control in judged]
    error = None if None in errors else math.sqrt(sum(e * e for e in errors)) / len(errors)
    return float(np.mean([control[key] for control in judged])), error


def _joint_accuracy(
    samples: EvaluationSamples, controls: Mapping[str, ControlConfig], measured: Mapping[str, OracleLabels | None]
) -> tuple[float | None, float | None]:
    right, asked_any = np.ones(len(samples), dtype=bool), np.zeros(len(samples), dtype=bool)
    for column, (name, control) in enumerate(controls.items()):
        judgement = measured[name]
        if judgement is None:
            return None, None
        asked = samples.labels[:, column] < control.num_classes
        right &= ~asked | (samples.labels[:, column] == judgement.classes)
        asked_any |= asked
    if not asked_any.any():
        return None, None
    return float(right[asked_any].mean()), _or_none(metrics.mean_standard_error(right[asked_any]))


def _diversity(
    samples: EvaluationSamples,
    controls: Mapping[str, ControlConfig],
    measured: Mapping[str, OracleLabels | None],
    by: Literal["label", "oracle"],
    notes: list[str],
) -> tuple[float | None, float | None]:
    """Within joint classes of the judged controls, so that before and after are grouped alike."""
    judged = [name for name in controls if measured[name] is not None] or (list(controls) if by == "label" else [])
    columns, keep = [], np.ones(len(samples), dtype=bool)
    for column, (name, control) in enumerate(controls.items()):
        judgement = measured[name]
        if name not in judged:
            continue
        if by == "label" or judgement is None:
            columns.append(samples.labels[:, column])
            keep &= samples.labels[:, column] < control.num_classes
        else:
            columns.append(judgement.classes)
    if not columns or not keep.any():
        notes.append("diversity: not measured; no sample has a known class")
        return None, None
    _, groups = np.unique(np.stack(columns, axis=1)[keep], axis=0, return_inverse=True)
    diversity = metrics.within_class_diversity(samples.images[keep], groups.reshape(-1))
    if math.isnan(diversity.mean):
        notes.append("diversity: not measured; no class has two samples")
    return _or_none(diversity.mean), _or_none(diversity.standard_error)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value
