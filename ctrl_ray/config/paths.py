"""Paths that a user gave, made absolute where the command line is read: workers run in other working directories."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ctrl_ray.config import TrainConfig
from ctrl_ray.embedded import is_embedded
from ctrl_ray.errors import ConfigError


def absolute_path(path: str) -> str:
    """A path of an input from the root, '~' replaced and links followed. The embedded example's name and what holds a scheme
    ('s3://…') stay as they are. ConfigError for what is no path."""
    if is_embedded(path) or "://" in path:
        return path
    if not path.strip():
        raise ConfigError("a path is empty; expected the path of a file or folder, or a URI")
    try:
        return str(Path(path).expanduser().resolve())
    except (
        ValueError,
        RuntimeError,
        OSError,
    ) as error:  # RuntimeError: an unknown user after '~', or links in a circle
        raise ConfigError(f"{path!r} is no path ({error}); expected the path of a file or folder, or a URI") from error


def absolute_model(base_model: str) -> str:
    """`absolute_path` of a base model that is a folder here; any other is the id of one on the hub, and stays."""
    try:
        is_here = Path(base_model).expanduser().exists()
    except (ValueError, RuntimeError, OSError):
        return base_model
    return absolute_path(base_model) if is_here else base_model


def absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config with every input's path absolute."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else absolute_path(path)

    kind, colon, source = config.classifier.network.partition(":")
    return dataclasses.replace(
        config,
        base_model=absolute_model(config.base_model),
        data=absolute(config.data),
        prompts_file=absolute(config.prompts_file),
        init_adapter=absolute(config.init_adapter),
        evaluation=dataclasses.replace(config.evaluation, prompts_file=absolute(config.evaluation.prompts_file)),
        classifier=dataclasses.replace(
            config.classifier, network=f"{kind}{colon}{absolute_model(source) if source else ''}"
        ),
        controls={
            name: dataclasses.replace(control, classifier=absolute(control.classifier))
            for name, control in config.controls.items()
        },
    )
