"""Every test is in one tier, and `.ci/run` runs what a submission must pass."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest

from tests.tiers import TIERS, tier_of

ROOT = Path(__file__).resolve().parents[2]


FOLDERS = ("unit", "integration", "multihost")


def _chosen(expression: str, tier: str | None, folder: str | None = None) -> bool:
    """Whether `-m expression` takes a test of this tier and this folder, whose name is a mark; pytest's grammar is Python's."""
    marks = {mark: mark == folder for mark in FOLDERS} | {mark: mark == tier for mark in TIERS}
    return bool(eval(expression, {"__builtins__": {}}, marks))


def _by_default(config: pytest.Config) -> str:
    options = config.getini("addopts")
    return str(options[options.index("-m") + 1])


def test_each_test_is_collected_by_one_tier(pytestconfig: pytest.Config) -> None:
    """Whatever its tier; that a test has one at most is held when tests are collected (tests/conftest.py)."""
    expressions = [_by_default(pytestconfig), *TIERS]
    for tier in (None, *TIERS):
        assert [_chosen(expression, tier) for expression in expressions].count(True) == 1, tier
    assert _chosen(expressions[0], None)
    assert tier_of(["unit"]) is None and tier_of(["integration", "full"]) == "full"
    with pytest.raises(ValueError, match="marked full and slow"):
        tier_of(["slow", "integration", "full"])


def test_tiers_are_known_marks_and_ci_runs_three_of_them(pytestconfig: pytest.Config) -> None:
    marks = {line.partition(":")[0] for line in pytestconfig.getini("markers")}
    assert set(TIERS) <= marks
    ci = (ROOT / ".ci" / "run").read_text()
    runs = re.findall(r"^[^#\n]*python -m pytest\b(?: -m (\w+|\"[^\"]+\"))?((?: tests/\w+)*)", ci, re.M)
    run = {
        (tier, folder)
        for chosen, folders in runs
        for tier, folder in product((None, *TIERS), FOLDERS)
        if _chosen(chosen.strip('"') or _by_default(pytestconfig), tier, folder)
        and (not folders or f"tests/{folder}" in folders.split())
    }
    must = {(tier, folder) for tier in (None, "full") for folder in ("unit", "integration")} | {
        ("multihost", "multihost")
    }
    assert must <= run and not {tier for tier, _ in run} & {"slow", "gpu"}
    halves = re.findall(r" tests/integration/test_\[(!?)([a-z]-[a-z])\]\*\.py", ci)
    assert (
        len(halves) == 2
        and {first for first, _ in halves} == {"", "!"}
        and len({letters for _, letters in halves}) == 1
    )
    told = (ROOT / "CONTRIBUTING.md").read_text()
    assert all(f"python -m pytest -m {tier}" in told for tier in TIERS)
