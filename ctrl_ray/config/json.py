"""Run settings as JSON (`config.json`) and back. No torch, no ray here."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.errors import ConfigError


def to_json(config: Any) -> str:
    """The config as indented JSON, the content of `config.json`."""
    return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=False)


def train_config_from_json(text: str, *, source: str = "config.json") -> TrainConfig:
    """The inverse of `to_json`; unknown or missing-typed keys are a `ConfigError` that names them."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{source} is not JSON: {error}") from error
    config: TrainConfig = _build(TrainConfig, values, source)
    return config


def _build(cls: type, values: dict[str, Any], source: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{source}: unknown settings {unknown} for {cls.__name__}; known ones are {sorted(fields)}")
    built: dict[str, Any] = {}
    for name, value in values.items():
        nested = fields[name].default_factory
        if name == "controls":
            value = {k: _build(ControlConfig, v, f"{source}: controls.{k}") for k, v in value.items()}
        elif isinstance(nested, type) and dataclasses.is_dataclass(nested):
            value = _build(nested, value, f"{source}: {name}")
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return cls(**built)
