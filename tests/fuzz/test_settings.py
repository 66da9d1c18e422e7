"""Configurations that were typed, edited or cut."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.config.control import check_control_name, control_name_of
from ctrl_ray.config.json import to_json, train_config_from_json
from ctrl_ray.config.presets import shapes
from tests.fuzz.command import works_or_is_refused

GOOD: dict[str, Any] = json.loads(to_json(shapes()))
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["auto", "false", "1e-4", "fp8", "", "../x", 10**400, -1, 0, 2**31, math.nan, math.inf])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def _paths(values: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(values, dict):
        return [path]
    return [path, *(found for key, value in values.items() for found in _paths(value, (*path, key)))][path == () :]


PATHS = _paths(GOOD)


@given(st.lists(st.tuples(st.sampled_from(PATHS), VALUES), min_size=1, max_size=3))
@example([(("full_finetune",), "false")])
@example([(("controls",), {"a b": {}})])
def test_settings_of_another_kind(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    values = copy.deepcopy(GOOD)
    for path, value in changes:
        place: Any = values
        for key in path[:-1]:
            place = place[key] if isinstance(place, dict) and key in place else {}
        if isinstance(place, dict):
            place[path[-1]] = value
    config = works_or_is_refused(lambda: train_config_from_json(json.dumps(values), source="mine.json"), "mine.json")
    if config is not None:  # what is taken stays as it is, and holds no NaN
        assert train_config_from_json(to_json(config)) == config
        assert "NaN" not in to_json(config)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@example(b"[" * 100_000)
@example('{"num_updates": 3}'.encode("utf-16"))
@example(b'{"num_updates": ' + b"9" * 5000 + b"}")
def test_files_that_are_no_json(data: bytes) -> None:
    config = works_or_is_refused(lambda: train_config_from_json(data, source="mine.json"), "mine.json")
    assert config is None or isinstance(config, TrainConfig)


@given(st.integers(0, len(to_json(shapes()))), st.binary(max_size=3))
def test_files_that_were_cut_or_overwritten(place: int, other: bytes) -> None:
    data = to_json(shapes()).encode()
    works_or_is_refused(lambda: train_config_from_json(data[:place] + other, source="mine.json"), "mine.json")
    works_or_is_refused(
        lambda: train_config_from_json(data[:place] + other + data[place + len(other) :], source="mine.json"),
        "mine.json",
    )


@given(st.text(max_size=12))
@example("keys")
@example("my-score")
@example("größe")
def test_names_of_controls(name: str) -> None:
    works_or_is_refused(lambda: check_control_name(name), "control")
    check_control_name(control_name_of(name))


@given(st.lists(st.text(max_size=6), max_size=4), st.lists(st.floats(), max_size=4))
@example(["$", "$$"], [1.0])
def test_names_of_classes(names: list[str], thresholds: list[float]) -> None:
    spec = works_or_is_refused(lambda: ControlConfig(classes=tuple(names), thresholds=tuple(thresholds)))
    if spec is not None:
        assert len(set(spec.class_names)) == spec.num_classes
        assert spec.num_classes in ((len(thresholds) + 1 if thresholds else 0), len(names))
