"""The trials of a sweep as plain values, the table of them, and which of them no other one beats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy.special import softmax
from scipy.stats import rankdata

from ctrl_ray.evaluation.certificate import effective_sample_size, log_mean_weight
from ctrl_ray.wording import text_table

Status = Literal["waiting", "running", "finished", "stopped early", "failed"]


@dataclass(frozen=True, kw_only=True)
class SweepTrial:
    """One trial: what was asked, and how far it came."""

    name: str
    knobs: Mapping[str, Any]
    """Dotted config path to value, of the settings that differ between trials."""
    status: Status
    guidance_strength: float
    """Of its first control."""
    kl_coef: float
    updates_done: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of its last evaluation; a finished trial's has all of them, with `accuracy_error` and `kl_error`."""
    seconds: float = 0.0
    error: str = ""
    folder: Path | None = None
    """A run folder, as `ctrl_ray.train` writes it."""

    @property
    def exponent(self) -> float:
        """guidance_strength / kl_coef: all that counts at the optimum."""
        return self.guidance_strength / self.kl_coef if self.kl_coef else math.inf

    def metric(self, name: str) -> float | None:
        """The last value; None where there is none."""
        value = self.metrics.get(name)
        return None if value is None or not math.isfinite(value) else float(value)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Path to the shortest end of it that no other path has: 'optimizer.learning_rate' to 'learning_rate'."""
    names = {}
    for path in paths:
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            end = ".".join(parts[-count:])
            if sum(other == end or other.endswith(f".{end}") for other in paths) == 1:
                break
        names[path] = end
    return names


def result_columns(trials: Sequence[SweepTrial]) -> list[tuple[str, str, str]]:
    """(title, metric, format) of the results in a sweep's tables: of several controls the accuracy of each, with the mean
    beside, and the gap where a trial has one."""
    known = {name for trial in trials for name in trial.metrics}
    controls = sorted(name for name in known if name.startswith("accuracy/") and not name.endswith("_error"))
    columns = [(f"accuracy of {name.partition('/')[2]}", name, ".3f") for name in controls] if len(controls) > 1 else []
    columns.append(("mean accuracy" if columns else "accuracy", "accuracy", ".3f"))
    if "gap" in known:
        columns.append(("gap / nats", "gap", ".2f"))
    return [*columns, ("KL / nats", "kl", ".2f"), ("fidelity", "prompt_fidelity", ".3f")]


def format_trials(trials: Sequence[SweepTrial], knobs: Sequence[str]) -> str:
    """The table of a sweep: trial, knobs, updates, results (`result_columns`), time, and what happened."""
    columns = result_columns(trials)
    head = ["trial", *short_names(knobs).values(), "updates", *(title for title, _, _ in columns), "minutes", ""]
    rows = [head]
    for trial in trials:
        results = [(trial.metric(name), digits) for _, name, digits in columns]
        rows.append(
            [
                trial.name,
                *(shown(trial.knobs.get(path)) for path in knobs),
                str(trial.updates_done),
                *("–" if value is None else format(value, digits) for value, digits in results),
                f"{trial.seconds / 60:.1f}",
                f"failed: {trial.error}" if trial.status == "failed" else trial.status,
            ]
        )
    return text_table(rows, left=(0, len(head) - 1))


def shown(value: Any) -> str:
    """A setting's value in a table."""
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def best_trial(trials: Sequence[SweepTrial], metric: str, mode: str) -> SweepTrial | None:
    """The finished trial with the best value; None when none has one."""
    sign = 1 if mode == "max" else -1
    known = [trial for trial in trials if trial.status == "finished" and trial.metric(metric) is not None]
    return max(known, key=lambda trial: sign * (trial.metric(metric) or 0.0), default=None)


@dataclass(frozen=True)
class EqualExponent:
    """Finished trials with the same guidance_strength / kl_coef, which theory says end alike."""

    exponent: float
    names: tuple[str, ...]
    kl: tuple[float, ...]

    @property
    def allowed(self) -> float:
        """Nats by which they may differ: 30 % of their mean KL, and 0.3 at least."""
        return max(0.3 * sum(self.kl) / len(self.kl), 0.3)

    @property
    def agree(self) -> bool:
        """Whether the largest and the smallest KL are that close."""
        return max(self.kl) - min(self.kl) <= self.allowed


def finished_trials(trials: Sequence[SweepTrial]) -> list[SweepTrial]:
    """Those that came to their final evaluation, with accuracy and KL."""
    return [t for t in trials if t.status == "finished" and None not in (t.metric("accuracy"), t.metric("kl"))]


def equal_exponents(trials: Sequence[SweepTrial]) -> list[EqualExponent]:
    """Groups of two or more finished trials of equal exponent, in order of it."""
    groups: dict[str, list[SweepTrial]] = {}
    for trial in finished_trials(trials):
        if math.isfinite(trial.exponent):
            groups.setdefault(f"{trial.exponent:.6g}", []).append(trial)
    found = [group for group in groups.values() if len(group) > 1]
    found.sort(key=lambda group: group[0].exponent)
    return [
        EqualExponent(group[0].exponent, tuple(t.name for t in group), tuple(float(t.metrics["kl"]) for t in group))
        for group in found
    ]


def exponent_correlation(trials: Sequence[SweepTrial]) -> float | None:
    """Spearman's rank correlation of log(guidance_strength / kl_coef) and KL over the finished trials; None for fewer than
    three different exponents, or when all KL are equal."""
    points = [(t.exponent, float(t.metrics["kl"])) for t in finished_trials(trials) if 0 < t.exponent < math.inf]
    if len({f"{exponent:.6g}" for exponent, _ in points}) < 3 or len({kl for _, kl in points}) < 2:
        return None
    exponents, kl = (rankdata(np.round(values, 9)) for values in zip(*points))
    return float(np.corrcoef(exponents, kl)[0, 1])


def pareto_front(kl: Sequence[float], accuracy: Sequence[float]) -> list[int]:
    """Indices of the points that no other one beats (no more KL and no less accuracy, one of them strictly), by KL."""
    order = sorted(range(len(kl)), key=lambda index: (kl[index], -accuracy[index]))
    front: list[int] = []
    highest = -math.inf
    for index in order:
        same = bool(front) and (kl[index], accuracy[index]) == (kl[front[-1]], accuracy[front[-1]])
        if accuracy[index] > highest or same:
            front.append(index)
            highest = accuracy[index]
    return front


@dataclass(frozen=True)
class Prediction:
    """Accuracy and KL of the optimum for each exponent, from samples of the pre-trained model."""

    exponents: np.ndarray
    accuracy: np.ndarray
    kl: np.ndarray
    effective_samples: np.ndarray
    """Smallest effective number of samples over the classes: below about 20 the prediction is noise."""


def predict_optimum(log_probs: np.ndarray, true_classes: np.ndarray, exponents: np.ndarray) -> Prediction:
    """What the theory says of the optimum: p*(x) ∝ p(x) p(y|x)^r with r = guidance_strength / kl_coef, and nothing else.

    By importance weights over samples x_i of the pre-trained model: w_i ∝ p(y|x_i)^r, accuracy = Σ w_i [true class is y],
    KL = Σ w_i r log p(y|x_i) − log mean_i p(y|x_i)^r, each a mean over the classes y. The start noise is fixed, so that
    this KL is a lower bound of the trajectory's (close to it for a chain that forgets its start).

    Args:
        log_probs: (N, K) by the reward classifier.
        true_classes: (N,) by the oracle.
        exponents: (R,) values of r.
    """
    right = true_classes[:, None] == np.arange(log_probs.shape[1])
    accuracy, kl, effective = [], [], []
    for exponent in exponents:
        scores = exponent * log_probs.astype(np.float64)
        weights = softmax(scores, axis=0)
        log_means = np.array([log_mean_weight(column).value for column in scores.T])
        accuracy.append(float((weights * right).sum(axis=0).mean()))
        kl.append(float(((weights * scores).sum(axis=0) - log_means).mean()))
        effective.append(min(effective_sample_size(column) for column in scores.T))
    return Prediction(np.asarray(exponents, dtype=np.float64), np.array(accuracy), np.array(kl), np.array(effective))
