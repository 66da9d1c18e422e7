"""What folders of fitted classifiers share: weights as safetensors beside a JSON file of settings that names the control."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ctrl_ray.config import ControlConfig
from ctrl_ray.config.fields import typed
from ctrl_ray.errors import ConfigError, ModelError

WEIGHTS = "model.safetensors"
_CONTROL_NEEDED: dict[str, Any] = {"control": str, "classes": tuple[str, ...]}
_CONTROL_MAY_BE: dict[str, Any] = {
    "thresholds": tuple[float, ...] | None,
    "unit": str | None,
    "oracle": str | None,
    "column": str | None,
}


class Layout(NamedTuple):
    """A kind of folder."""

    what: str
    """What a message calls it: 'classifier folder'."""
    settings: str
    """Name of its JSON file."""
    command: str
    """What writes it."""
    needed: Mapping[str, Any]
    """Settings with their types, beside those of the control."""
    may_be: Mapping[str, Any]
    """The same of settings that may be missing."""


def write_folder(
    folder: str | Path, layout: Layout, network: nn.Module, control: str, spec: ControlConfig, more: Mapping[str, Any]
) -> None:
    """Write the weights, and then the settings: those of the control, and `more`."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in network.state_dict().items()}
    save_file(weights, path / WEIGHTS)
    settings = {
        "control": control,
        "classes": spec.class_names,
        "thresholds": spec.thresholds,
        "unit": spec.unit,
        "oracle": spec.oracle,
        "column": spec.column,
        **more,
    }
    (path / layout.settings).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_settings(folder: str | Path, layout: Layout) -> dict[str, Any]:
    """The settings; ModelError for a folder that is none of the kind, or whose settings are no JSON, missing or of a wrong
    type."""
    path = Path(folder)
    for name in (layout.settings, WEIGHTS):
        if not (path / name).is_file():
            raise ModelError(f"{layout.what} {path} holds no {name}; expected a folder that `{layout.command}` wrote")
    file = path / layout.settings
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not JSON ({error}); fit the classifier again") from error
    needed, may_be = {**_CONTROL_NEEDED, **layout.needed}, {**_CONTROL_MAY_BE, **layout.may_be}
    missing = [key for key in needed if not isinstance(settings, dict) or key not in settings]
    if missing:
        raise ModelError(f"{file} lacks {', '.join(missing)}; fit the classifier again")
    try:
        given = {key: typed(settings[key], hint, key) for key, hint in {**needed, **may_be}.items() if key in settings}
    except ConfigError as error:
        raise ModelError(f"{file} is inconsistent: {error}; fit the classifier again") from error
    return {**settings, **given}


def control_of(folder: str | Path, layout: Layout, settings: Mapping[str, Any]) -> ControlConfig:
    """The control as the folder describes it; guidance strength and label law are the run's, not the classifier's."""
    try:
        return ControlConfig(
            oracle=settings.get("oracle"),
            thresholds=tuple(settings.get("thresholds") or ()),
            classes=tuple(settings["classes"]),
            unit=settings.get("unit") or "",
            column=settings.get("column"),
        )
    except ConfigError as error:
        raise ModelError(f"{Path(folder) / layout.settings} is inconsistent: {error}") from error


def check_control(folder: str | Path, layout: Layout, settings: Mapping[str, Any], control: str) -> None:
    """ModelError where the folder was fitted for another control."""
    if settings["control"] != control:
        raise ModelError(
            f"{layout.what} {folder} was fitted for control {settings['control']!r}, but it is given for "
            f"{control!r}; rename the control or fit a classifier for it with `{layout.command}`"
        )


def load_weights(network: nn.Module, folder: str | Path, layout: Layout, spec: ControlConfig) -> None:
    """Put the folder's weights into its network; ModelError where they are of another one."""
    try:
        network.load_state_dict(load_file(Path(folder) / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{Path(folder) / WEIGHTS} does not fit the network of {layout.settings}, which has {spec.num_classes} outputs "
            f"{list(spec.class_names)}: {reason[:300]}; the two files must come from the same fit"
        ) from error
