"""Samples without their images: what is compared of each of them, small enough to keep a hundred thousand.

Any image has a JPEG size, a colourfulness, a texture, a brightness and a place in a fixed feature space; a control adds its
classifier's log-probabilities, and its oracle's value where it has an oracle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from ctrl_ray.config import ControlConfig
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.oracles import ORACLES, load_oracle, measure
from ctrl_ray.runs.files import whole_file

SMALL_SIDE = 16
"""Blocks along each side of an image, in its features."""
_PREFIXES = ("class_log_probs", "values")


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """N samples of C controls."""

    prompts: tuple[str, ...]
    """N prompts."""
    sample_ids: np.ndarray
    """(N,) int64: key of the sample's noise."""
    labels: np.ndarray
    """(N, C) int64: the classes asked for."""
    class_log_probs: Mapping[str, np.ndarray]
    """Control to (N, K) float32: log p̂ of every class."""
    values: Mapping[str, np.ndarray]
    """Statistic to (N,) float64: of each control with an oracle, under its name, and of any image."""
    features: np.ndarray
    """(N, 1024) float32 of `image_features`."""
    log_ratio: np.ndarray | None
    """(N,) float64 in nats: log of the policy's density of the path over the pre-trained model's; None: not known."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def first(self, count: int) -> Measured:
        """The first `count` samples."""
        return self.select(np.arange(len(self))[:count])

    def select(self, rows: np.ndarray) -> Measured:
        """The samples at `rows`, an index or boolean array."""
        index = np.arange(len(self))[rows]
        return Measured(
            prompts=tuple(self.prompts[row] for row in index),
            sample_ids=self.sample_ids[index],
            labels=self.labels[index],
            class_log_probs={name: each[index] for name, each in self.class_log_probs.items()},
            values={name: each[index] for name, each in self.values.items()},
            features=self.features[index],
            log_ratio=None if self.log_ratio is None else self.log_ratio[index],
        )


def measure_samples(samples: EvaluationSamples, controls: Mapping[str, ControlConfig]) -> Measured:
    """Measure samples; DataError where an oracle answers with no number."""
    values = {
        name: measure(load_oracle(c.oracle), samples.images, samples.prompts)
        for name, c in controls.items()
        if c.oracle
    }
    for name, oracle in ORACLES.items():
        if all(control.oracle != name for control in controls.values()):  # else it is a control's own value
            values.setdefault(name, measure(oracle, samples.images))
    grey = [image.astype(np.float32).mean(axis=-1) for image in samples.images]
    values.setdefault("texture", np.array([_texture(image) for image in grey], dtype=np.float64))
    values.setdefault("brightness", np.array([image.mean() for image in grey], dtype=np.float64))
    return Measured(
        prompts=samples.prompts,
        sample_ids=samples.sample_ids,
        labels=samples.labels,
        class_log_probs={name: samples.class_log_probs[name] for name in controls},
        values=values,
        features=image_features(samples.images),
        log_ratio=samples.log_ratio,
    )


def _texture(grey: np.ndarray) -> float:
    """Mean absolute difference of neighbouring grey values (H, W), in [0, 510]."""
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean())


def image_features(images: np.ndarray) -> np.ndarray:
    """A fixed feature space: 16 × 16 mean colours and the contrast inside each of these blocks, (N, 1024) in [0, 1].

    images: (N, H, W, 3) uint8; sides that 16 does not divide are resized to 64 first.
    """
    return np.stack([_features(image) for image in images])


def _features(image: np.ndarray) -> np.ndarray:
    if image.shape[0] % SMALL_SIDE or image.shape[1] % SMALL_SIDE:
        image = np.asarray(Image.fromarray(image).resize((64, 64)))
    height, width = (side // SMALL_SIDE for side in image.shape[:2])
    blocks = image.reshape(SMALL_SIDE, height, SMALL_SIDE, width, 3) / 255.0
    contrast = blocks.mean(axis=-1).std(axis=(1, 3))
    return np.concatenate([blocks.mean(axis=(1, 3)).ravel(), contrast.ravel()]).astype(np.float32)


def join(parts: Sequence[Measured]) -> Measured:
    """The samples of all parts, in order; one part at least, all with the same controls."""
    ratios = [part.log_ratio for part in parts if part.log_ratio is not None]
    return Measured(
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        sample_ids=np.concatenate([part.sample_ids for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        class_log_probs={k: np.concatenate([p.class_log_probs[k] for p in parts]) for k in parts[0].class_log_probs},
        values={k: np.concatenate([part.values[k] for part in parts]) for k in parts[0].values},
        features=np.concatenate([part.features for part in parts]),
        log_ratio=np.concatenate(ratios) if len(ratios) == len(parts) else None,
    )


def save(measured: Measured, file: Path) -> None:
    """Write one safetensors file, whole or not at all."""
    tensors = {"sample_ids": measured.sample_ids, "labels": measured.labels, "features": measured.features}
    for prefix in _PREFIXES:
        tensors |= {f"{prefix}/{name}": each for name, each in getattr(measured, prefix).items()}
    if measured.log_ratio is not None:
        tensors["log_ratio"] = measured.log_ratio
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(file) as draft:
        save_file(
            {name: np.ascontiguousarray(each) for name, each in tensors.items()},
            draft,
            metadata={"prompts": json.dumps(measured.prompts)},
        )


def load(file: Path) -> Measured:
    """The inverse of `save`."""
    with safe_open(file, framework="numpy") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
        prompts = tuple(json.loads(opened.metadata()["prompts"]))
    groups = {
        prefix: {name.partition("/")[2]: each for name, each in tensors.items() if name.startswith(f"{prefix}/")}
        for prefix in _PREFIXES
    }
    return Measured(
        prompts=prompts,
        sample_ids=tensors["sample_ids"],
        labels=tensors["labels"],
        class_log_probs=groups["class_log_probs"],
        values=groups["values"],
        features=tensors["features"],
        log_ratio=tensors.get("log_ratio"),
    )
