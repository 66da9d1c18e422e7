"""What a dry run takes for granted where nobody said it: a base model's configuration, a control, data, prompts, a card."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import ray
import torch

from ctrl_ray.cluster.connection import names_cluster
from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.config.presets import ANIMALS
from ctrl_ray.embedded import data_or_embedded
from ctrl_ray.policy.base_model import is_here, outline_of

MACHINES = "1x1x80GB"
"""Planned for where there is no GPU and no machines are stated."""
DATA = "data.parquet"
"""Stands for labelled images that are not named yet; nothing is read of it."""
CONTROL = {"control": ControlConfig(classes=("a", "b", "c", "d"))}
"""Stands for a control that is not named yet."""


class Assumed(NamedTuple):
    """A run as a dry run plans it."""

    config: TrainConfig
    machines: str | None
    without_data: bool
    """Whether DATA stands for the labelled images."""
    lines: list[str]
    """What was taken for granted, for people."""


def assumed(config: TrainConfig, machines: str | None) -> Assumed:
    """Fill in what a plan needs and the command does not say. A base model whose configuration the package holds is not
    fetched for a plan."""
    lines: list[str] = []
    changes: dict[str, Any] = {}

    def take(name: str, line: str, **assumed: Any) -> None:
        lines.append(f"{name:<10} {line}")
        changes.update(assumed)

    outline = outline_of(config.base_model)
    if outline is not None and not is_here(config.base_model, config.base_revision):
        line = f"{config.base_model} is not on this machine: counted from its configuration, which the package holds"
        take("base model", line, base_model=outline, base_revision=None)
    if not config.controls:
        take("controls", "none is given (--control): planned for one of four classes", controls=CONTROL)
    fitted = all(control.classifier for control in (config.controls or CONTROL).values())
    data = data_or_embedded(config.data, config.base_model)
    if data is None and not fitted:
        take("data", "none is given (--data): planned without looking at any", data=DATA)
    if data is None and not config.prompts_file:
        line = "none are given (--prompts-file): planned for the animals that the package holds"
        take("prompts", line, prompts_file=str(ANIMALS))
    found = ray.is_initialized() or names_cluster() or torch.cuda.device_count()
    if config.scaling.use_gpu and machines is None and not found:
        machines = MACHINES
        lines.append("machines   there is no GPU here: planned for one of 80 GB; --machines says which else")
    return Assumed(dataclasses.replace(config, **changes), machines, data is None and not fitted, lines)
