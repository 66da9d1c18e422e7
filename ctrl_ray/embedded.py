"""The embedded example: two pipelines, a classifier and a recogniser of drawn shapes, which the package holds by name."""

from __future__ import annotations

from pathlib import Path

NAME = "shapes"
"""What it is called as a base model, and as data: then it is drawn."""

FLOW_NAME = "shapes-flow"
"""What its other base model is called, a small Stable Diffusion 3."""

FOLDER = Path(__file__).resolve().parent / NAME
"""What `ctrl_ray.shapes.make` wrote."""

PIPELINE = FOLDER / "pipeline"
"""The base model, in the diffusers format."""

FLOW_PIPELINE = FOLDER / "flow_pipeline"
"""The other one."""

PIPELINES = {NAME: PIPELINE, FLOW_NAME: FLOW_PIPELINE}
"""Folder of each base model, by name."""

FLOW_TEXT_TOKENS = 1
"""Zeros in the place of a T5's tokens, with which `shapes-flow` was trained: `sampler.max_sequence_length`."""

CLASSIFIER = FOLDER / "classifier"
"""Of JPEG-size classes."""

RECOGNISER = FOLDER / "recogniser"
"""Says which shape in which colour an image shows."""


def is_embedded(name: str | None) -> bool:
    """Whether a base model or a data set is an embedded one; as data, both names are the same drawings."""
    return name in PIPELINES


def data_or_embedded(data: str | None, base_model: str) -> str | None:
    """The data set that is meant: the given one, else the embedded one where the base model is."""
    return NAME if data is None and is_embedded(base_model) else data
