"""What a setting's annotation says it may be: its type, and its range beside the type. One checker for every configuration.

    learning_rate: Annotated[float, at_least(0)] = 1e-3
    num_workers: Annotated[int | Auto, at_least(1)] = 1

A number without a range may be any finite one: NaN and infinity are none of them.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from ctrl_ray.config.values import require


@dataclasses.dataclass(frozen=True)
class Range:
    """The finite numbers of an interval."""

    least: float = -math.inf
    most: float = math.inf
    without_least: bool = False
    without_most: bool = False

    def __contains__(self, number: float) -> bool:
        low = self.least < number if self.without_least else self.least <= number
        high = number < self.most if self.without_most else number <= self.most
        return abs(number) < math.inf and low and high

    def __str__(self) -> str:
        if math.isinf(self.least):
            return "a finite number"
        if math.isinf(self.most):
            return f"a number above {self.least:g}" if self.without_least else f"at least {self.least:g}"
        return (
            f"a number in {'(' if self.without_least else '['}{self.least:g}, {self.most:g}"
            f"{')' if self.without_most else ']'}"
        )


FINITE = Range()


def at_least(least: float) -> Range:
    """[least, ∞)."""
    return Range(least)


def above(least: float) -> Range:
    """(least, ∞)."""
    return Range(least, without_least=True)


def share(*, without_0: bool = False, without_1: bool = False) -> Range:
    """[0, 1], or without one of its ends."""
    return Range(0.0, 1.0, without_0, without_1)


def check_fields(config: Any, group: str = "") -> None:
    """Check every field of a configuration by its annotation, for its `__post_init__`.

    What is of a type that means the same becomes the one that is meant (see `typed`). ConfigError names the setting (after
    `group`, as on the command line), what it is and what was expected.
    """
    for name, hint in _hints(config.__class__).items():
        path = f"{group}.{name}" if group else name
        given = getattr(config, name)
        value = typed(given, hint, path)
        allowed = _range(hint)
        for number in _numbers(value):
            each = "each " if isinstance(value, tuple) else ""
            require(number in allowed, f"{path} is {value}; expected {each}{_allowed_text(hint, allowed, number)}")
        if value is not given:
            object.__setattr__(config, name, value)


def typed(value: Any, hint: Any, path: str) -> Any:
    """`value` as the setting wants it (3.0 for 3 where a float is meant, a tuple for a list, text for a path, Python's number
    for numpy's); ConfigError when it is not of that type."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    fits, result = _of_type(value, hint)
    require(fits, f"{path} is {value!r} ({type(value).__name__}); expected {shown(hint)}")
    return result


def shown(hint: Any) -> str:
    """A type in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return shown(arguments[0])
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(shown(argument) for argument in arguments)
    if origin is tuple:
        return (
            f"a list, each item {shown(arguments[0])}" if arguments[-1] is Ellipsis else f"a list of {len(arguments)}"
        )
    if hint is type(None):
        return "None"
    if origin is dict or dataclasses.is_dataclass(hint):
        return "a group of settings"
    names = {"int": "an integer", "float": "a number", "str": "a string", "bool": "True or False"}
    return names.get(hint.__name__, hint.__name__)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _range(hint: Any) -> Range:
    if get_origin(hint) is Annotated:
        return next((extra for extra in hint.__metadata__ if isinstance(extra, Range)), FINITE)
    return FINITE


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _allowed_text(hint: Any, allowed: Range, number: float) -> str:
    finite = [] if abs(number) < math.inf or allowed == FINITE else [str(FINITE)]
    asked = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    words = [f"or {word}" for part in get_args(asked) if get_origin(part) is Literal for word in get_args(part)]
    return ", ".join([*finite, str(allowed), *words])


def _of_type(value: Any, hint: Any) -> tuple[bool, Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _of_type(value, arguments[0])
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments), value
    if origin in (Union, types.UnionType):
        for argument in arguments:
            fits, result = _of_type(value, argument)
            if fits:
                return True, result
        return False, value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            return False, value
        if len(arguments) != 2 or arguments[1] is not Ellipsis:
            items = [_of_type(*pair) for pair in zip(value, arguments, strict=False)]
            return len(value) == len(arguments) and all(fits for fits, _ in items), tuple(item for _, item in items)
        items = [_of_type(item, arguments[0]) for item in value]
        fits = all(fits for fits, _ in items)
        same = isinstance(value, tuple) and all(item is given for (_, item), given in zip(items, value, strict=True))
        return fits, value if same else tuple(item for _, item in items)
    if origin is dict:
        if not isinstance(value, dict):
            return False, value
        return all(
            _of_type(key, arguments[0])[0] and _of_type(item, arguments[1])[0] for key, item in value.items()
        ), value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return True, float(value)
        except OverflowError:
            return False, value
    if hint is str and isinstance(value, os.PathLike):
        return True, os.fspath(value)
    return type(value) is hint, value
