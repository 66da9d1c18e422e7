"""What a comparison with exact samples says in words: one sentence, and a table for those who want to know where."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ctrl_ray.verification.distances import Comparison
from ctrl_ray.wording import gap_text

MAX_RATIO = 3.0
"""Bar: each control's own distance (`own_distance`), in noise floors."""
_FULL_TABLES = 8
"""With more joint classes, the printed tables hold the bar's statistics alone."""


def farthest(comparisons: Sequence[Comparison], bars: Collection[tuple[str, str]]) -> float | None:
    """The largest ratio of these (statistic, distance); None where there is none, or where it is infinite."""
    ratios = [item.ratio for item in comparisons if (item.statistic, item.distance) in bars]
    return max(ratios) if ratios and math.isfinite(max(ratios)) else None


def headline(adapter: str, results: Mapping[str, Any]) -> str:
    """How many classes meet the bar, on how many samples, which is the farthest; and the gap."""
    rows = results["classes"]
    met, known = sum(row["bar_met"] for row in rows), [row for row in rows if row["bar_ratio"] is not None]
    worst = max(known, key=lambda row: row["bar_ratio"], default=None)
    where = "" if worst is None else f" (the farthest: {worst['name']!r}, at {worst['bar_ratio']:.1f} of them)"
    many = "all" if met == len(rows) else "none" if not met else f"{met}"
    sides = sorted(row["distances"][0]["num_samples"] for row in rows if row["distances"])
    size = (
        ""
        if not sides
        else f", with {sides[0]}" + (f" to {sides[-1]}" if sides[-1] > sides[0] else "") + " on each side"
    )
    missing = sum(row["shortage"] is not None for row in rows)
    unknown = f"; {missing} could not be compared" if missing else ""
    return (
        f"{adapter}: {many} of {len(rows)} joint classes {'is' if many == '1' else 'are'} within {MAX_RATIO:g} noise floors of "
        f"exact samples of the target{size}{where}{unknown}. On average the samples are {gap_text(results['certificate'])}."
    )


def format_classes(results: Mapping[str, Any]) -> str:
    """For each joint class its certificate and its distances."""
    rows, bars = results["classes"], results["bar"]["distances"]
    short = len(rows) > _FULL_TABLES
    width = max((len(d["statistic"]) for row in rows for d in row["distances"]), default=9)
    head = f"  {'statistic':<{width}} {'distance':<19} {'reached':>9} {'floor':>9} {'ratio':>7} {'before':>9}"
    lines = []
    for row in rows:
        distances = [d for d in row["distances"] if not short or [d["statistic"], d["distance"]] in bars]
        a_side = f"{distances[0]['num_samples']} on each side" if distances else "not compared"
        lines += [
            f"{row['name']}: {row['exact_samples']} exact among {results['pool_samples']} pre-trained samples, {a_side}"
            + _prompts(distances, results["num_prompts"]),
            f"  {_certificate(row['certificate'])}",
            *([head] if distances else [f"  {row['shortage']}"]),
            *(
                f"  {d['statistic']:<{width}} {d['distance']:<19} {d['reached']:9.3f} {d['floor']:9.3f} "
                f"{math.inf if d['ratio'] is None else d['ratio']:7.2f} {d['before']:9.3f}"
                for d in distances
            ),
            "",
        ]
    bar = results["bar"]
    lines.append(
        f"{' and '.join(f'{distance} distance of {statistic}' for statistic, distance in bars)} at most "
        f"{bar['max_ratio']:g} × the noise floor in every class: {'yes' if bar['met'] else 'NO'}"
    )
    if results["certificate"]["log_z_pooled"]:
        lines.append("log Z is pooled over prompts, for want of samples of each: an upper bound of it, and of the gap")
    if short:
        lines.append("the other statistics are in results.json")
    return "\n".join(lines)


def _prompts(distances: Sequence[Mapping[str, Any]], total: int) -> str:
    compared = distances[0]["num_prompts"] if distances else total
    return f", {compared} of {total} prompts" if compared < total else ""


def _certificate(certificate: Mapping[str, Any]) -> str:
    pareto_k = certificate["pareto_k"]
    shape = "" if pareto_k is None else f", k̂ {pareto_k:.2f}"
    return (
        f"gap {certificate['gap']:.2f} ± {certificate['gap_standard_error']:.2f} nats, log Z {certificate['log_z']:.2f}, "
        f"effective sample size {certificate['ess']:.1%}{shape}{', too wide to trust' if certificate['too_wide'] else ''}"
    )
