"""The numbers of a comparison: of one set of images, of a method's seeds, the choice of a knob's value, and who wins what.

Distances are Wasserstein distances of each control's measured value to exact samples, over the noise floor of as many exact
samples (`verification.distances`); a floor falls with the number of images, so two distances compare at the same number only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ctrl_ray.config import ControlConfig
from ctrl_ray.evaluation.judging import ImageScore, PromptFidelity, judge
from ctrl_ray.evaluation.metric_names import SCORES
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.verification.distances import compare, own_distance
from ctrl_ray.verification.gaps import certify_classes
from ctrl_ray.verification.measured import Measured, measure_samples
from ctrl_ray.verification.rejection import Pool
from ctrl_ray.verification.summary import farthest
from ctrl_ray.verification.target import JointClass

CRITERION = (
    "smallest distance to the target in the worst class (Wasserstein over noise floor) on the validation images, mean over "
    "seeds; ties by cost"
)
NUMBERS = ("accuracy", "joint_accuracy", "macro_f1", "prompt_fidelity", "diversity", "kl", "gap")
NEAR_COST, FAR_COST = 1.1, 4.0
"""The two bounds on cost, in plain samples, below which CTRL is to be nearest."""
FIDELITY_LOSS, DIVERSITY_SHARE = 0.01, 0.9
"""What an accuracy that counts may lose of the pre-trained model's fidelity, and must keep of its diversity."""
Z_95 = 1.96


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """What images are compared with."""

    pool: Pool
    """Pre-trained samples, and which of them are exact samples of each class."""
    classes: Sequence[JointClass]
    controls: Mapping[str, ControlConfig]
    exponents: Mapping[str, float]
    fidelity: PromptFidelity | None
    seed: int
    scorers: Mapping[str, ImageScore] = field(default_factory=dict)
    """Of `metric_names.SCORES`, by name."""


def distance_of(target: Target, measured: Measured) -> dict[str, Any]:
    """'classes': name to the largest ratio of the controls' own distances, None where too few exact samples are there;
    'worst': the largest of them, None where none is known; 'images': on each side, in all."""
    bars = {own_distance(name, control) for name, control in target.controls.items()}
    ratios, sides = {}, 0
    for index, joint in enumerate(target.classes):
        found = compare(
            target.pool.samples, target.pool.accepted[index], measured, joint, target.controls, seed=target.seed
        )
        ratio = farthest(found, bars)
        ratios[joint.name] = None if ratio is None else round(ratio, 4)
        sides += found[0].num_samples if found else 0
    known = [ratio for ratio in ratios.values() if ratio is not None]
    return {"classes": ratios, "worst": max(known, default=None), "images": sides}


def numbers_of(target: Target, samples: EvaluationSamples, *, pre_trained: bool, common: int) -> dict[str, Any]:
    """Everything that is told about one set of images, ready for JSON.

    pre_trained: they were not told their class, so their diversity is within true classes. common: so many of the images make
    the distance that compares between methods.
    """
    measured = measure_samples(samples, target.controls)
    by: Literal["oracle", "label"] = "oracle" if pre_trained else "label"
    judged = judge(samples, target.controls, fidelity=target.fidelity, scorers=target.scorers, by=by)
    errors = judged["standard_errors"]
    found: dict[str, Any] = {name: judged.get(name) for name in (*NUMBERS, *SCORES) if name != "gap"}
    found["errors"] = {name: errors.get(name) for name in found}
    found |= {"num_images": len(samples), "gap": None, "too_wide": None}
    if measured.log_ratio is not None:
        pool = _pool_of(target.pool.samples, measured)
        of_classes, of_all = certify_classes(pool, measured, target.exponents, target.classes)
        found |= {"gap": of_all["gap"], "too_wide": bool(of_all["too_wide"])}
        found["class_gaps"] = {joint.name: row["gap"] for joint, row in zip(target.classes, of_classes, strict=True)}
        found["errors"]["gap"] = of_all["gap_standard_error"]
    found["distance"] = distance_of(target, measured)
    found["common_distance"] = (
        found["distance"] if common >= len(measured) else distance_of(target, measured.first(common))
    )
    found["per_class"] = {
        name: {"accuracy": control["accuracy"], "confusion": control["confusion"]}
        for name, control in judged["controls"].items()
    }
    return found


def _pool_of(pool: Measured, measured: Measured) -> Measured:
    """The pre-trained samples of the prompts that are judged."""
    return pool.select(np.isin(pool.prompts, sorted(set(measured.prompts))))


def over_seeds(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each number over a method's seeds, with its standard error: the larger of what the images' own errors make
    and what the seeds' differences make. Of distances also the range."""
    found: dict[str, Any] = {"num_images": sum(row["num_images"] for row in rows), "errors": {}}
    for name in (*NUMBERS, *SCORES):
        values: list[Any] = [row.get(name) for row in rows]
        errors = [row["errors"].get(name) for row in rows]
        found[name] = None if None in values else float(np.mean(values))
        known = [error for error in errors if error is not None]
        own = math.sqrt(sum(error**2 for error in known)) / len(rows) if len(known) == len(rows) else None
        between = float(np.std(values, ddof=1) / math.sqrt(len(rows))) if len(rows) > 1 and None not in values else 0.0
        found["errors"][name] = None if own is None or found[name] is None else max(own, between)
    found["too_wide"] = None if found["gap"] is None else any(row["too_wide"] for row in rows)
    found["control_accuracies"] = _means([_accuracies(row) for row in rows])
    found["class_gaps"] = _means([row.get("class_gaps", {}) for row in rows])
    for name in ("distance", "common_distance"):
        found[name] = _mean_distance([row[name] for row in rows])
    return found


def _accuracies(row: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: control["accuracy"] for name, control in row.get("per_class", {}).items()}


def _means(rows: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Of each name, over rows that all have it."""
    columns = {name: [row.get(name) for row in rows] for name in rows[0]}
    return {name: None if None in values else float(np.mean(values)) for name, values in columns.items()}  # type: ignore[arg-type]


def _mean_distance(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    classes: dict[str, float | None] = {}
    for name in rows[0]["classes"]:
        values = [row["classes"][name] for row in rows]
        classes[name] = None if None in values else float(np.mean(values))
    worst = [row["worst"] for row in rows if row["worst"] is not None]
    return {
        "classes": classes,
        "worst": float(np.mean(worst)) if worst else None,
        "range": [min(worst), max(worst)] if worst else None,
        "images": rows[0]["images"],
    }


def choose(rows: Sequence[Mapping[str, Any]]) -> int:
    """The row with the smallest 'worst' distance, of equal ones the one with the lowest 'cost' (see CRITERION).

    A row without a distance comes last.
    """
    return min(
        range(len(rows)),
        key=lambda index: (
            math.inf if rows[index]["worst"] is None else rows[index]["worst"],
            rows[index]["cost"],
            index,
        ),
    )


def interval(value: float, error: float | None) -> tuple[float, float] | None:
    """95 %, of a share within 0 and 1; None where the error is not known."""
    return None if error is None else (max(0.0, value - Z_95 * error), min(1.0, value + Z_95 * error))


def verdicts(methods: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each bar whether CTRL meets it, and a sentence; empty where CTRL or the pre-trained model is not among the methods.

    methods: rows of results.json, each with 'name', 'title', 'test' (`over_seeds`) and 'cost' (`cost.Cost`).
    """
    by_name = {row["name"]: row for row in methods}
    if "ctrl" not in by_name or "plain" not in by_name:
        return []
    return [
        _nearest(by_name["ctrl"], methods, NEAR_COST),
        _nearest(by_name["ctrl"], methods, FAR_COST),
        _most_accurate(by_name["ctrl"], methods, by_name["plain"]),
    ]


def _nearest(ctrl: Mapping[str, Any], methods: Sequence[Mapping[str, Any]], bound: float) -> dict[str, Any]:
    bar = f"smallest distance to the target of all methods at ≤ {bound:g} × plain sampling"
    own, cost = _worst(ctrl), ctrl["cost"]["ratio"]
    if own is None:
        return {"bar": bar, "met": False, "text": "CTRL's distance is not known: too few exact samples"}
    if cost > bound:
        return {"bar": bar, "met": False, "text": f"CTRL itself costs {cost:.2f} × plain sampling"}
    others = [row for row in methods if row is not ctrl and row["cost"]["ratio"] <= bound and _worst(row) is not None]
    text = f"CTRL is at {own:.2f} noise floors in its worst class, at {cost:.2f} × plain sampling"
    if not others:
        return {"bar": bar, "met": True, "text": f"{text}; no other method is within the bound"}
    rival = min(others, key=lambda row: _worst(row) or 0.0)
    met = own <= (_worst(rival) or 0.0)
    word = "the nearest other method" if met else "nearer"
    return {
        "bar": bar,
        "met": met,
        "text": f"{text}; {word}: {rival['title']}, at {_worst(rival):.2f} and {rival['cost']['ratio']:.2f} ×",
    }


def _worst(row: Mapping[str, Any]) -> float | None:
    value: float | None = row["test"]["common_distance"]["worst"]
    return value


def keeps_images(row: Mapping[str, Any], plain: Mapping[str, Any]) -> bool:
    """Whether a method's fidelity and diversity are near enough to the pre-trained model's for its accuracy to count."""
    fidelity, before = row["test"]["prompt_fidelity"], plain["test"]["prompt_fidelity"]
    faithful = fidelity is None or before is None or fidelity >= before - FIDELITY_LOSS
    diversity, at_first = row["test"]["diversity"], plain["test"]["diversity"]
    return faithful and (diversity is None or at_first is None or diversity >= DIVERSITY_SHARE * at_first)


def _most_accurate(
    ctrl: Mapping[str, Any], methods: Sequence[Mapping[str, Any]], plain: Mapping[str, Any]
) -> dict[str, Any]:
    bar = "highest accuracy of those whose fidelity is within 1 point and diversity within 0.9 × of the pre-trained model's"
    own, error = ctrl["test"]["accuracy"], ctrl["test"]["errors"]["accuracy"]
    if own is None:
        return {"bar": bar, "met": False, "text": "no control has an oracle, so nothing measures the accuracy"}
    if not keeps_images(ctrl, plain):
        text = (
            f"CTRL itself is outside: fidelity {_three(ctrl['test']['prompt_fidelity'])} "
            f"({_three(plain['test']['prompt_fidelity'])} before), diversity {_three(ctrl['test']['diversity'])} "
            f"({_three(plain['test']['diversity'])} before)"
        )
        return {"bar": bar, "met": False, "text": text}
    others = [row for row in methods if row is not ctrl and row is not plain and keeps_images(row, plain)]
    if not others:
        return {"bar": bar, "met": True, "text": f"CTRL's accuracy is {own:.3f}; no other method keeps the images"}
    rival = max(others, key=lambda row: row["test"]["accuracy"])
    theirs, their_error = rival["test"]["accuracy"], rival["test"]["errors"]["accuracy"]
    met = own >= theirs
    noise = 2 * math.hypot(error or 0.0, their_error or 0.0)
    tie = ", within two standard errors" if abs(own - theirs) <= noise else ""
    relation = "the next is" if met else "higher is"
    return {
        "bar": bar,
        "met": met,
        "text": f"CTRL's accuracy is {own:.3f}; {relation} {rival['title']} with {theirs:.3f}{tie}",
    }


def _three(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
