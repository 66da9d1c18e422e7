"""Adapters that are given instead of trained: whether they fit the preset, and what stands under the table about them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ctrl_ray.config import TrainConfig
from ctrl_ray.errors import ConfigError
from ctrl_ray.evaluation.certificate import exponents_of
from ctrl_ray.policy.adapter_info import read_adapter_info
from ctrl_ray.runs.finished import find_classifiers
from ctrl_ray.verification.target import trained_exponents

_WEIGHTS = "model.safetensors"


def check_given_adapter(name: str, folder: str, config: TrainConfig) -> str:
    """The adapter's absolute folder; ConfigError where it lacks a control of the preset, or is of another base model."""
    path = Path(folder).expanduser().resolve()
    info = read_adapter_info(path)
    missing = [control for control in config.controls if control not in info.controls]
    if missing:
        raise ConfigError(
            f"--adapters {name}={folder} has the controls {list(info.controls)}, but the preset compares {missing}; expected "
            "an adapter with all of them, or another --preset"
        )
    if info.base_model != config.base_model:
        raise ConfigError(
            f"--adapters {name}={folder} is of the base model {info.base_model}; expected {config.base_model}, the preset's"
        )
    return str(path)


def adapter_note(folder: str, config: TrainConfig, title: str) -> str | None:
    """What makes a given adapter's target another one than the comparison's; None where nothing does."""
    info = read_adapter_info(folder)
    odd = []
    try:
        theirs = trained_exponents(folder, info)
    except ConfigError:
        odd.append("its exponents are not known (it was trained without a KL, or with another one)")
    else:
        ours = exponents_of(config.controls, config.kl_coef)
        odd += [
            f"it was trained for λ = {theirs[name]:g} of {name}, not {exponent:g}"
            for name, exponent in ours.items()
            if name in theirs and theirs[name] != exponent
        ]
    if info.sampler != config.sampler:
        odd.append("it was trained for another sampler than the preset's")
    own = find_classifiers(folder, list(config.controls), {})
    for name, control in config.controls.items():
        if name not in own or _digest(own[name]) != _digest(Path(str(control.classifier))):
            odd.append(f"it was trained with another classifier of {name} than the comparison's")
    return f"{title}: {'; '.join(odd)}" if odd else None


def _digest(classifier: Path) -> str | None:
    file = classifier / _WEIGHTS
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None
