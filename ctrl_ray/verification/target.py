"""What an adapter was trained for: for each joint class y the law p_pre(x|c) Π_c p̂_c(y_c|x,c)^λ_c / Z(c, y).

λ_c = guidance_strength_c / kl_coef is the exponent of a control, and a joint class names one class of every control.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.config.json import read_train_config
from ctrl_ray.errors import ConfigError
from ctrl_ray.evaluation.certificate import joint_log_tilts
from ctrl_ray.policy.adapter import AdapterInfo


@dataclass(frozen=True)
class JointClass:
    """One class of every control."""

    labels: tuple[int, ...]
    """In the order of the controls."""
    name: str
    """As people read it: '<2677', or with several controls 'jpeg_size <2677, colourfulness >=67'."""


def joint_classes(controls: Mapping[str, ControlConfig]) -> list[JointClass]:
    """Every combination of the controls' classes; the first control's changes fastest, as samples with consecutive ids ask
    for them (`evaluation_batch`)."""
    found = []
    for reversed_labels in itertools.product(*(range(c.num_classes) for c in reversed(list(controls.values())))):
        labels = reversed_labels[::-1]
        names = [control.class_names[label] for control, label in zip(controls.values(), labels, strict=True)]
        several = ", ".join(f"{control} {name}" for control, name in zip(controls, names, strict=True))
        found.append(JointClass(labels, names[0] if len(names) == 1 else several))
    return found


def trained_exponents(adapter: str | Path, info: AdapterInfo) -> dict[str, float]:
    """λ of every control that the adapter's run trained, in the order of the adapter's controls.

    kl_coef is in adapter.json, else in RUN/config.json beside the adapter. Controls that the run took over from an initial
    adapter are left out where RUN/config.json says so. Raises ConfigError where the exponent cannot be known, or where the
    KL was the mean over the latents.
    """
    file = Path(adapter).resolve().parent / "config.json"
    config: TrainConfig | None = None
    if file.is_file():
        config = read_train_config(file)
    reduction = info.training.get("latent_reduction") or (None if config is None else config.latent_reduction)
    if reduction == "mean":
        raise ConfigError(
            f"adapter {adapter} was trained with latent_reduction mean, which divides the KL by the number of latents, so "
            "guidance_strength / kl_coef is not the exponent of its target; expected latent_reduction sum. Train with "
            "--latent-reduction sum to verify it"
        )
    kl_coef = info.training.get("kl_coef", None if config is None else config.kl_coef)
    if not isinstance(kl_coef, int | float) or not kl_coef > 0:
        raise ConfigError(
            f"the exponent of {adapter}'s target, guidance_strength / kl_coef, is unknown: kl_coef is {kl_coef!r} in its "
            f"adapter.json, and {file} {'says no better' if config else 'does not exist'}; expected a positive number. Put "
            "the run's config.json beside the adapter folder"
        )
    trained = info.controls if config is None else config.controls
    exponents = {name: c.guidance_strength / kl_coef for name, c in info.controls.items() if name in trained}
    if not exponents:
        raise ConfigError(
            f"{file} is of a run with the controls {list(trained)}, but adapter {adapter} has {list(info.controls)}; expected "
            "the config.json of the run that made the adapter"
        )
    return exponents


def log_tilts(
    class_log_probs: Mapping[str, np.ndarray], exponents: Mapping[str, float], classes: Sequence[JointClass]
) -> np.ndarray:
    """Σ_c λ_c log p̂_c(y_c|x,c) of N samples for each of J joint classes, (J, N) float64, at most 0.

    class_log_probs: Control to (N, K).
    """
    tilts = joint_log_tilts(np.array([joint.labels for joint in classes]), exponents, class_log_probs)
    return np.minimum(tilts, 0.0)  # rounding of a log-softmax
