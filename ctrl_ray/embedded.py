"""The embedded example: a pipeline, a classifier and a recogniser of drawn shapes, which the package holds under one name."""

from __future__ import annotations

from pathlib import Path

NAME = "shapes"
"""What it is called as a base model, and as data: then it is drawn."""

FOLDER = Path(__file__).resolve().parent / NAME
"""What `ctrl_ray.shapes.make` wrote."""

PIPELINE = FOLDER / "pipeline"
"""The base model, in the diffusers format."""

CLASSIFIER = FOLDER / "classifier"
"""Of JPEG-size classes."""

RECOGNISER = FOLDER / "recogniser"
"""Says which shape in which colour an image shows."""


def is_embedded(name: str | None) -> bool:
    """Whether a base model or a data set is the embedded one."""
    return name == NAME


def data_or_embedded(data: str | None, base_model: str) -> str | None:
    """The data set that is meant: the given one, else the embedded one where the base model is."""
    return NAME if data is None and is_embedded(base_model) else data
