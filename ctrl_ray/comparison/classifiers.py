"""The classifiers that all methods are given: fitted on labelled images alone, or taken; and how far the shipped ones differ.

A classifier that has seen samples of the pipeline is not one that a method could have had from the labelled images, so the
comparison's own are fitted with `num_pipeline_samples = 0`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctrl_ray.classifiers.calibration import calibration_metrics
from ctrl_ray.classifiers.classifier import SETTINGS
from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.driver.classifier import fit_classifier
from ctrl_ray.errors import ConfigError
from ctrl_ray.evaluation.certificate import log_mean_weight


def given_classifiers(config: TrainConfig, given: Mapping[str, str]) -> dict[str, str]:
    """Absolute folders of the classifiers that are given, by control.

    ConfigError where one is given for a control that the preset does not have, or where its folder holds none.
    """
    unknown = sorted(set(given) - set(config.controls))
    if unknown:
        raise ConfigError(f"--classifier names {unknown}; the preset has the controls {list(config.controls)}")
    folders = {name: Path(folder).expanduser().resolve() for name, folder in given.items()}
    for name, folder in folders.items():
        if not (folder / SETTINGS).is_file():
            raise ConfigError(
                f"--classifier {name}={given[name]} holds no {SETTINGS}; expected a folder that `python -m ctrl_ray.classify` "
                "wrote, or leave it out: the comparison then fits its own"
            )
    return {name: str(folder) for name, folder in folders.items()}


def offline_classifiers(config: TrainConfig, folder: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Folder of every control's classifier: the given one, else FOLDER/NAME, fitted where it is not there."""
    fitting = dataclasses.replace(config, classifier=dataclasses.replace(config.classifier, num_pipeline_samples=0))
    folders = {}
    for name in config.controls:
        folders[name] = given.get(name, str(folder / name))
        if not (Path(folders[name]) / SETTINGS).is_file():
            fit_classifier(fitting, name, output_dir=folder / name)
    return folders


def with_classifiers(config: TrainConfig, folders: Mapping[str, str]) -> TrainConfig:
    """The run with these classifiers in place of its own."""
    controls = {
        name: dataclasses.replace(control, classifier=folders[name]) for name, control in config.controls.items()
    }
    return dataclasses.replace(config, controls=controls)


def shipped_classifiers(config: TrainConfig) -> dict[str, str]:
    """Those that the preset names, where it names one for each control; else none."""
    folders = {name: control.classifier for name, control in config.controls.items()}
    return {} if None in folders.values() else {name: str(folder) for name, folder in folders.items()}


def classifier_difference(
    own: np.ndarray, shipped: np.ndarray, truth: np.ndarray | None, control: ControlConfig, exponent: float
) -> dict[str, Any]:
    """How far two classifiers differ on n pre-trained images; ready for JSON.

    Args:
        own: (n, K) log-probabilities of the comparison's.
        shipped: (n, K) of the preset's.
        truth: (n,) true classes by the oracle; None: nothing measures them.
        exponent: λ of the control.

    Returns:
        'total_variation', the mean over images of ½ Σ |p − q|; 'log_z' of each class by both; and by both the
        `calibration_metrics` against the truth.
    """
    difference = 0.5 * np.abs(np.exp(own) - np.exp(shipped)).sum(axis=1)
    sides = {"own": own.astype(np.float64), "shipped": shipped.astype(np.float64)}
    found: dict[str, Any] = {"num_images": len(own), "total_variation": float(difference.mean())}
    for side, log_probs in sides.items():
        columns = zip(control.class_names, exponent * log_probs.T, strict=True)
        found[side] = {"log_z": {name: log_mean_weight(column).value for name, column in columns}}
        if truth is not None:
            found[side] |= calibration_metrics(torch.from_numpy(log_probs), torch.from_numpy(truth))
    return found
