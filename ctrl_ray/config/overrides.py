"""Settings by dotted path ("optimizer.learning_rate"), checked by type and by the config's own rules. No torch, no ray."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_type_hints

from ctrl_ray.config import TrainConfig
from ctrl_ray.config.fields import typed
from ctrl_ray.errors import ConfigError


def override(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """`config` with the settings at these paths replaced; what belongs together is replaced together.

    ConfigError for a path that does not exist (with the nearest one that does), a value of another type, or one that the
    config refuses.
    """
    known = setting_paths(config)
    tree: dict[str, Any] = {}
    for path, value in values.items():
        if path not in known:
            raise ConfigError(f"setting {path!r} does not exist{nearest(path, known)}")
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = typed(value, known[path], path)
    try:
        replaced: TrainConfig = _replaced(config, tree)
    except ConfigError as error:
        asked = ", ".join(f"{path} = {value!r}" for path, value in values.items())
        raise ConfigError(f"{error} (asked for: {asked})") from None
    return replaced


def nearest(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?', or all that is known when nothing is near."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if not close:  # the last part alone may be right, or nearly so
        ends = {full.rpartition(".")[2]: full for full in names}
        close = [ends[end] for end in difflib.get_close_matches(name.rpartition(".")[2], list(ends), n=1, cutoff=0.7)]
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(sorted(names))}"


def setting_paths(config: TrainConfig) -> dict[str, Any]:
    """Dotted path of every single setting of this config, with its type."""
    return _paths(config, "")


def _paths(node: Any, prefix: str) -> dict[str, Any]:
    hints = get_type_hints(type(node))
    found: dict[str, Any] = {}
    for field in dataclasses.fields(node):
        value, path = getattr(node, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            found |= _paths(value, f"{path}.")
        elif isinstance(value, dict):
            for key, item in value.items():
                found |= _paths(item, f"{path}.{key}.")
        else:
            found[path] = hints[field.name]
    return found


def _replaced(node: Any, tree: Mapping[str, Any]) -> Any:
    if isinstance(node, dict):
        return {key: _replaced(item, tree[key]) if key in tree else item for key, item in node.items()}
    changes = {
        name: _replaced(getattr(node, name), value) if isinstance(value, dict) else value
        for name, value in tree.items()
    }
    return dataclasses.replace(node, **changes)
