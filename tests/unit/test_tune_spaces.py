"""Every sweep file names a preset, a metric and settings that exist, and draws only values that the config accepts."""

from __future__ import annotations

import dataclasses
import random
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctrl_ray import presets
from ctrl_ray.config import TrainConfig
from ctrl_ray.evaluation.metric_names import METRICS

FILES = sorted((Path(__file__).resolve().parents[2] / "tune_spaces").glob("*.py"))


def _replaced(node: Any, path: list[str], value: Any) -> Any:
    """`node` with the value at `path` replaced; the checks of every dataclass on the way run again."""
    if not path:
        return value
    name, *rest = path
    if isinstance(node, dict):
        assert name in node, f"{name!r} is not one of {sorted(node)}"
        return {**node, name: _replaced(node[name], rest, value)}
    names = [field.name for field in dataclasses.fields(node)]
    assert name in names, f"{name!r} is not a setting of {type(node).__name__}: {names}"
    return dataclasses.replace(node, **{name: _replaced(getattr(node, name), rest, value)})


def _values(entry: Any) -> list[Any]:
    """Every value of a grid, some draws of a distribution, or the constant itself."""
    if isinstance(entry, dict) and "grid_search" in entry:
        return entry["grid_search"]
    if hasattr(entry, "sample"):
        return [entry.sample() for _ in range(8)]
    return [entry]


def test_there_are_sweeps() -> None:
    assert {file.name for file in FILES} >= {"guidance_grid.py", "kl_guidance.py"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_sweep_fits_its_preset(file: Path) -> None:
    random.seed(0)
    np.random.seed(0)
    sweep = runpy.run_path(str(file))
    assert sweep["MODE"] in ("min", "max")
    metric = METRICS[sweep["METRIC"]]
    assert metric.higher_is_better == (sweep["MODE"] == "max")
    base = getattr(presets, sweep["PRESET"])()
    assert isinstance(base, TrainConfig)
    space = sweep["space"]()
    assert space
    for path, entry in space.items():
        for value in _values(entry):
            changed = _replaced(base, path.split("."), value)
            assert isinstance(changed, TrainConfig)


def test_a_path_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(AssertionError, match="not a setting of TrainConfig"):
        _replaced(TrainConfig(), ["kl_coeff"], 1.0)
    with pytest.raises(AssertionError, match="is not one of"):
        _replaced(TrainConfig(), ["controls", "no_such_control", "guidance_strength"], 1.0)
