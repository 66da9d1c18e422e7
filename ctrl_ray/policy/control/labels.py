"""Classes as people name them, as label columns."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctrl_ray.config import ControlConfig
from ctrl_ray.config.control import same_text
from ctrl_ray.errors import ConfigError

ControlValue = int | str | None
_MOST_DIGITS = 10
"""Python refuses to read numbers of thousands of digits."""


def class_index(name: str, control: ControlConfig, value: ControlValue) -> int:
    """Label of a class given by name, by index (also as text, '2'), or None for null.

    A name comes before an index; accents may be composed or not. Raises ConfigError that lists the classes.
    """
    if value is None:
        return control.num_classes
    if isinstance(value, str):
        names = [same_text(class_name) for class_name in control.class_names]
        text = same_text(value)
        if text in names:
            return names.index(text)
        index = int(text) if text.isdecimal() and len(text) < _MOST_DIGITS else -1
    else:
        try:
            index = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            index = -1
    if not 0 <= index < control.num_classes:
        classes = ", ".join(f"{i} = {class_name!r}" for i, class_name in enumerate(control.class_names))
        raise ConfigError(
            f"class {value!r} of control {name!r} does not exist; expected one of {classes}; for none of them leave the "
            "control out (None)"
        )
    return index


def number_names_line(name: str, control: ControlConfig) -> str | None:
    """What a number means where classes are named by numbers other than their indices (see `class_index`); None: nothing is
    to be told."""
    named = [
        (index, text)
        for index, text in enumerate(control.class_names)
        if text.isdecimal() and len(text) < _MOST_DIGITS and text != str(index)
    ]
    if not named:
        return None
    index, text = named[0]
    number = int(text)
    asked = (
        f"--control {name}={text} and controls={{{name!r}: {text!r}}} ask for the class named {text!r} (index {index})"
    )
    other = (
        f"is index {number}, the class named {control.class_names[number]!r}"
        if number < control.num_classes
        else "is an index that there is not"
    )
    return (
        f"classes of {name} are named by numbers: {asked}; the number in Python, controls={{{name!r}: {number}}}, {other}; "
        f"labels in data are indices, from 0"
    )


def label_rows(
    asked: Mapping[str, ControlValue | Sequence[ControlValue]], controls: Mapping[str, ControlConfig], num_prompts: int
) -> Tensor:
    """Labels (num_prompts, C) int64, a column for each of `controls`.

    asked: one class per control, or one for each prompt; what is omitted or None is null. Raises ConfigError for a control
    or class that there is not, and for another number of classes than prompts.
    """
    unknown = [name for name in asked if name not in controls]
    if unknown:
        raise ConfigError(f"unknown control {unknown[0]!r}; this adapter has {list(controls)}")
    columns = []
    for name, control in controls.items():
        value = asked.get(name)
        single = value is None or isinstance(value, str) or not hasattr(value, "__len__")
        values: Sequence[Any] = [value] * num_prompts if single else value  # type: ignore[assignment]
        if len(values) != num_prompts:
            raise ConfigError(
                f"control {name!r} has {len(values)} classes for {num_prompts} prompts; give one for each, or one for all"
            )
        columns.append([class_index(name, control, one) for one in values])
    return torch.tensor(columns, dtype=torch.long).reshape(-1, num_prompts).T


def parse_labels(arguments: Sequence[str], controls: Mapping[str, ControlConfig]) -> dict[str, int]:
    """Labels by control of 'NAME=CLASS' arguments; ConfigError for what there is not."""
    labels: dict[str, int] = {}
    for argument in arguments:
        name, equals, value = (part.strip() for part in argument.partition("="))
        if not equals or name in labels:
            raise ConfigError(f"control {argument!r} is not NAME=CLASS, once for each control; example: jpeg_size=2")
        if name not in controls:
            raise ConfigError(f"unknown control {name!r}; this adapter has {list(controls)}")
        labels[name] = class_index(name, controls[name], value)
    return labels
