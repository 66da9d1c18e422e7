"""Command lines with values of any kind: a configuration, or exit status 2."""

from __future__ import annotations

import contextlib
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from ctrl_ray import train
from ctrl_ray.classify import ClassifyConfig, train_config
from ctrl_ray.config import TrainConfig
from ctrl_ray.label import LabelConfig
from ctrl_ray.sample import SampleConfig
from tests.fuzz.command import works_or_is_refused

VALUES = st.sampled_from(
    [
        "",
        " ",
        "0",
        "-1",
        "1e400",
        "nan",
        "inf",
        "auto",
        "None",
        "true",
        "x",
        "9" * 400,
        "1.5",
        "a=b",
        "é",
        "[1, 2]",
        "{}",
    ]
) | st.text("aA01 .-=_,'\"$#%\u00e9\u597d", max_size=8)


def _flags(cls: Any, group: str = "") -> Iterator[str]:
    for field in dataclasses.fields(cls):
        name = f"{group}{field.name}"
        nested = field.default_factory
        if isinstance(nested, type) and dataclasses.is_dataclass(nested):
            yield from _flags(nested, f"{name}.")
        elif nested is not dict:
            yield "--" + name.replace("_", "-")


def _classify(argv: Sequence[str]) -> None:
    train_config(tyro.cli(ClassifyConfig, args=argv))


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], Any], list[str]]] = {
    "label": (
        lambda argv: tyro.cli(LabelConfig, args=["--images", "a", "--output", "b", *argv]),
        [*_flags(LabelConfig)],
    ),
    "sample": (
        lambda argv: tyro.cli(SampleConfig, args=["--adapter", "a", "--prompt", "b", *argv]),
        [*_flags(SampleConfig)],
    ),
    "classify": (_classify, [*_flags(ClassifyConfig)]),
    "train": (train.parse, [*_flags(TrainConfig), "--control", "--preset", "--config"]),
}


@pytest.mark.parametrize("command", list(COMMANDS))
@given(st.data(), VALUES)
def test_flags_of_any_value(command: str, data: st.DataObject, value: str) -> None:
    parse, flags = COMMANDS[command]
    flag = data.draw(st.sampled_from(flags))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            works_or_is_refused(lambda: parse([flag, value]))
        except SystemExit as ended:
            assert ended.code == 2, (flag, value)
