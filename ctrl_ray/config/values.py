"""What settings are made of: values that are decided later, and the check that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from ctrl_ray.errors import ConfigError

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""Of a denoiser's weights and products; see `ScalingConfig.precision`."""

Auto = Literal["auto"]
"""A value that is decided when a run is prepared (`ctrl_ray.planning.choose`), from its machines and counted memory.
config.json records what was asked; everything behind the preflight sees a number."""

T = TypeVar("T", int, float, bool)


def require(condition: bool, message: str) -> None:
    """ConfigError with the message where the condition does not hold."""
    if not condition:
        raise ConfigError(message)


def fixed(value: T | Auto, name: str) -> T:
    """The value; ConfigError while it is still to be decided."""
    if isinstance(value, str):
        raise ConfigError(f"{name} is {value!r}: it becomes a number when a run is prepared")
    return value


def named_values(option: str, arguments: Sequence[str], example: str) -> dict[str, str]:
    """Values by name of 'NAME=VALUE' arguments of a flag; ConfigError for another form and for a name given twice."""
    values: dict[str, str] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        if not name or not value or name in values:
            raise ConfigError(f"{option} {argument!r} is not NAME=VALUE, once for each name; example: {example}")
        values[name] = value
    return values
