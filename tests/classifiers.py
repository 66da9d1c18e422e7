"""Classifiers that nobody has fitted, where a test needs one that answers, not one that is right."""

from __future__ import annotations

from pathlib import Path

import torch

from ctrl_ray.classifiers.classifier import ImageClassifier
from ctrl_ray.classifiers.networks import SmallCNN
from ctrl_ray.config import ControlConfig


def save_classifier(folder: Path, control: str, spec: ControlConfig) -> None:
    """A network of random weights, as stage 1 leaves a fitted one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SmallCNN(spec.num_classes)
    ImageClassifier(network, kind="cnn", arguments={}, control=control, spec=spec, temperature=1.0).eval().save(folder)
