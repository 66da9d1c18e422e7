"""Ratios of labels from the rows of a comparison over label budgets."""

from __future__ import annotations

from typing import Any

import pytest

from ctrl_ray.comparison.budgets.lines import make_budget_plan
from ctrl_ray.comparison.budgets.run import ratios_of


def row(line: str, budget: int, *worst: float) -> dict[str, Any]:
    return {"line": line, "budget": budget, "seeds": [{"common_distance": {"worst": value}} for value in worst]}


def test_a_line_with_one_seed_is_compared_with_our_first() -> None:
    plan = make_budget_plan(("ctrl", "cfg"), (64, 256), num_steps=10, num_classes=4)
    rows = [row("ctrl", 64, 10.0, 1.0, 1.0), row("ctrl", 256, 5.0, 1.0, 1.0)]
    rows += [row("cfg", 64, 10.0, 2.0, 1.0), row("cfg", 256, 5.0, 1.0, 1.0)]
    rows += [row("cfg-pairs", 64, 20.0), row("cfg-pairs", 256, 10.0)]
    found = ratios_of(plan, rows)
    assert list(found) == ["cfg", "cfg-pairs"] and [len(one["bounds"]) for one in found["cfg"]] == [3, 3]
    assert (found["cfg-pairs"][0]["ratio"], found["cfg-pairs"][0]["bounds"]) == (pytest.approx(4.0), ["="])
