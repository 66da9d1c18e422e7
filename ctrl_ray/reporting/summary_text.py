"""A run's numbers for the terminal: the table of before and after, and what is said beneath it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ctrl_ray.evaluation.findings import findings_text
from ctrl_ray.evaluation.metric_names import EVALUATION_METRICS
from ctrl_ray.reporting.summary import baseline_of
from ctrl_ray.wording import floor_note, gap_text

OF_EACH_CONTROL = ("accuracy", "macro_f1", "belief_gap")
"""The headline numbers that are means over the controls."""
TABLE_METRICS = tuple(
    name for metric in EVALUATION_METRICS for name in ((metric, "gap") if metric == "kl" else (metric,))
)
"""Rows of the table, in order."""


def rows_by_control(name: str, controls: Sequence[str]) -> list[tuple[str, str | None]]:
    """(label, control) of the rows of one number, None for what stands for all: with several controls one for each of them,
    the mean beside."""
    if name not in OF_EACH_CONTROL or len(controls) == 1:
        return [(name, None)]
    return [*((f"{name}/{control}", control) for control in controls), (f"{name}, mean", None)]


def number_of(side: Mapping[str, Any], name: str, control: str | None) -> float | None:
    """A number of one side of the summary, of all controls or of one; None where it was not measured."""
    value: float | None = (side if control is None else side["controls"][control]).get(name)
    return value


def format_summary(summary: Mapping[str, Any], names: Sequence[str] = TABLE_METRICS) -> str:
    """Lines for the terminal: one for each number that was measured, with several controls one for each of them."""
    sides = [side for side in ("before", "after") if side in summary]
    controls = list(summary["after"]["controls"])
    rows: list[tuple[str, list[str], str]] = []
    for name in names:
        if name == "joint_accuracy" and len(controls) == 1:
            continue
        for label, control in rows_by_control(name, controls):
            values = [number_of(summary[side], name, control) for side in sides]
            if any(value is not None for value in values):
                texts = ["–" if v is None else str(v) if name == "num_samples" else f"{v:.3f}" for v in values]
                rows.append((label, texts, _beside(name, summary)))
    width = max((len(label) for label, _, _ in rows), default=0) + 2
    lines = [f"{'':{width}}" + "".join(f"{side:>10}" for side in sides)]
    lines += [f"{label:{width}}" + "".join(f"{text:>10}" for text in texts) + beside for label, texts, beside in rows]
    return "\n".join(lines)


def closing_lines(summary: Mapping[str, Any]) -> list[str]:
    """What is said beneath the table: how far the policy is from its target, and what it has not learned."""
    after = summary["after"]
    method = summary.get("method")
    who = "The policy" if method is None else f"Method {method}"
    lines = [f"{who} is {gap_text(after)}."] if after.get("gap") is not None else []
    return [*lines, *findings_text(after.get("not_learned", ()), baseline_of(summary))]


def _beside(name: str, summary: Mapping[str, Any]) -> str:
    if name == "kl":
        return floor_note(summary.get("kl_noise_floor"))
    return f" ± {summary['after']['gap_standard_error']:.3f}   (nats from the target)" if name == "gap" else ""
