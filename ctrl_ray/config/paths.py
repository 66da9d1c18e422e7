"""Paths that a user gave, made absolute where the command line is read: workers run in other working directories."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.embedded import is_embedded
from ctrl_ray.errors import ConfigError

CLIP_HEAD = "clip_head"
"""Kind of the oracles that a file of weights makes: 'clip_head:FILE' (`ctrl_ray.classifiers.clip_head`)."""


def absolute_path(path: str) -> str:
    """A path of an input from the root, '~' replaced and links followed. The embedded example's name and what holds a scheme
    ('s3://…') stay as they are. ConfigError for what is no path."""
    if is_embedded(path) or "://" in path:
        return path
    if not path.strip():
        raise ConfigError("a path is empty; expected the path of a file or folder, or a URI")
    try:
        return str(_followed(Path(path).expanduser()))
    except (ValueError, RuntimeError, OSError) as error:  # RuntimeError: an unknown user after '~'
        raise ConfigError(f"{path!r} is no path ({error}); expected the path of a file or folder, or a URI") from error


def _followed(path: Path) -> Path:
    """From the root, links followed; OSError for links in a circle, of which Python 3.13's `resolve` says nothing."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise
    return path.resolve()


def absolute_model(base_model: str) -> str:
    """`absolute_path` of a base model that is a folder here; any other is the id of one on the hub, and stays."""
    try:
        is_here = Path(base_model).expanduser().exists()
    except (ValueError, RuntimeError, OSError):
        return base_model
    return absolute_path(base_model) if is_here else base_model


def absolute_network(network: str) -> str:
    """'KIND:NAME_OR_FOLDER' of a classifier's network, as `absolute_model`."""
    kind, colon, source = network.partition(":")
    return f"{kind}{colon}{absolute_model(source) if source else ''}"


def absolute_oracle(oracle: str) -> str:
    """'clip_head:FILE' or 'clip_head:FILE@NAME_OR_FOLDER' with the file and the folder absolute; any other oracle as it is."""
    kind, _, spec = oracle.partition(":")
    if kind != CLIP_HEAD or not spec:
        return oracle
    file, at, model = spec.partition("@")
    return f"{kind}:{absolute_path(file)}{at}{absolute_model(model) if model else ''}"


def absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config with every input's path absolute."""

    def absolute(path: str | None) -> str | None:
        return None if path is None else absolute_path(path)

    def control(given: ControlConfig) -> ControlConfig:
        return dataclasses.replace(
            given,
            classifier=absolute(given.classifier),
            oracle=None if given.oracle is None else absolute_oracle(given.oracle),
            network=None if given.network is None else absolute_network(given.network),
        )

    beside = config.evaluation
    return dataclasses.replace(
        config,
        base_model=absolute_model(config.base_model),
        data=absolute(config.data),
        prompts_file=absolute(config.prompts_file),
        init_adapter=absolute(config.init_adapter),
        evaluation=dataclasses.replace(
            beside,
            prompts_file=absolute(beside.prompts_file),
            clip_model=None if beside.clip_model is None else absolute_model(beside.clip_model),
            brisque_model=absolute(beside.brisque_model),
        ),
        classifier=dataclasses.replace(config.classifier, network=absolute_network(config.classifier.network)),
        controls={name: control(given) for name, given in config.controls.items()},
    )
