"""Benchmarks are run by hand alone: what moves in the package must move in them."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__"))
def test_a_benchmark_imports(name: str) -> None:
    """Every name that it takes from the package is there."""
    assert callable(importlib.import_module(f"tests.benchmarks.{name}").main)
