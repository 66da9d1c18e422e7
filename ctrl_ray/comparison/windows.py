"""What the methods that push each step reach when they begin later: one-step predictions of noisy latents are blurs, and a
classifier of images misreads a blur."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ctrl_ray.comparison.bench import Bench, Source
from ctrl_ray.comparison.methods import Method, Setting
from ctrl_ray.comparison.plan import DEAR, MethodPlan
from ctrl_ray.config.method import OPTIONS

STARTS = (0.0, 0.2, 0.4, 0.6, 0.8)
"""Shares of the steps, noise first, before which nothing is pushed."""


def windows_of(bench: Bench, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each such method that is not dear, at its chosen value: what it reaches from each of STARTS on, on as many of the test
    images as every method has.

    rows: of results.json. Returns 'name', 'title', and 'starts': 'start', 'accuracy', its 'error', and the 'worst' class's
    distance, each; ready for JSON.
    """
    found = []
    for row in rows:
        plan = next((plan for plan in bench.question.plan.methods if plan.name == row["name"]), None)
        if plan is None or not has_window(plan) or plan.cost(row["chosen"]) > DEAR:
            continue
        sources = bench.sources(plan, [])
        starts = [_start(bench, plan, row["chosen"], start, sources) for start in STARTS]
        found.append({"name": plan.name, "title": plan.method.title, "starts": starts})
    return found


def has_window(plan: MethodPlan) -> bool:
    """A sampler of the pre-trained model with a window of its own."""
    return "window" in OPTIONS.get(plan.name, ())


def _start(bench: Bench, plan: MethodPlan, value: float, start: float, sources: Sequence[Source]) -> dict[str, Any]:
    counts = dataclasses.replace(plan.counts, test=bench.question.plan.common_test)
    later = dataclasses.replace(plan, method=starting_at(plan.method, start), counts=counts)
    (numbers,), _ = bench.test(later, value, sources)
    return {
        "start": start,
        "accuracy": numbers["accuracy"],
        "error": numbers["errors"]["accuracy"],
        "worst": numbers["common_distance"]["worst"],
    }


def starting_at(method: Method, start: float) -> Method:
    """The method where nothing is pushed before this share of the steps."""

    def setting(*arguments: Any) -> Setting:
        whole = method.setting(*arguments)
        return dataclasses.replace(whole, method=dataclasses.replace(whole.method, window=(start, 1.0)))

    return dataclasses.replace(method, setting=setting, title=f"{method.title} from {start:.0%} on")
