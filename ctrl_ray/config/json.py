"""Run settings as JSON (`config.json`) and back. No torch, no ray here."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.config.tracker import earlier_tracker
from ctrl_ray.errors import ConfigError


def to_json(config: Any) -> str:
    """The config as indented JSON, the content of `config.json`."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=False)


def train_config_from_json(text: str | bytes, *, source: str = "config.json") -> TrainConfig:
    """The inverse of `to_json`. It is read as strictly as a command line: a `ConfigError` names the source, the setting, what
    it is and what was expected where one is unknown, of another type or out of its range."""
    try:
        values = json.loads(text if isinstance(text, str) else text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 text ({error}); expected JSON in UTF-8: save it so") from error
    except (ValueError, RecursionError) as error:  # also an integer of thousands of digits
        raise ConfigError(f"{source} is not JSON: {error}") from error
    config: TrainConfig = _build(TrainConfig, _with_tracker(values, source), source, "")
    return config


def _with_tracker(values: Any, source: str) -> Any:
    """The settings `aim` and `aim_repo` of earlier versions as `tracker`, with one line where that is not its default."""
    if not isinstance(values, dict) or not {"aim", "aim_repo"} & set(values) or "tracker" in values:
        return values
    now = earlier_tracker(values.get("aim", True), values.get("aim_repo"))
    if now != "aim":
        print(f"{source}: aim and aim_repo of an earlier version are read as tracker {now!r}", file=sys.stderr)
    return {name: value for name, value in values.items() if name not in ("aim", "aim_repo")} | {"tracker": now}


def read_train_config(file: Path) -> TrainConfig:
    """The settings of a file; see `train_config_from_json`."""
    return train_config_from_json(file.read_bytes(), source=str(file))


def _build(cls: type, values: Any, source: str, path: str) -> Any:
    where = f"{source}: {path}" if path else source
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {json.dumps(values)}; expected a group of settings, {{…}}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{where}: unknown settings {unknown} for {cls.__name__}; known ones are {sorted(fields)}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        nested, inner = fields[name].default_factory, f"{path}.{name}" if path else name
        if name == "controls":
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {inner} is {json.dumps(value)}; expected a group for each control, {{…}}")
            value = {k: _build(ControlConfig, v, source, f"{inner}.{k}") for k, v in value.items()}
        elif isinstance(nested, type) and dataclasses.is_dataclass(nested):
            value = _build(nested, value, source, inner)
        built[name] = value
    try:
        return cls(**built)
    except ConfigError as error:
        raise ConfigError(f"{source}: {path + ': ' if cls is ControlConfig else ''}{error}") from None
