"""What an evaluation looks at: decoded images with what was asked of them, as plain arrays."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ctrl_ray.errors import DataError

_LOG_PROBS = "class_log_probs/"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class EvaluationSamples:
    """N decoded samples of C controls. Columns of `labels` are in the order of the run's `controls`.

    Raises:
        DataError: The arrays disagree about N, or have another shape or type than said here.
    """

    images: np.ndarray
    """(N, H, W, 3) uint8, as a PNG stores them."""
    prompts: tuple[str, ...]
    """N prompts."""
    labels: np.ndarray
    """(N, C) int64: the class asked for; num_classes of a control is its null label (nothing asked)."""
    kl: np.ndarray
    """(N,) float64: KL to the pre-trained model along the trajectory, in nats; NaN where it was not measured."""
    class_log_probs: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Control to (N, K): log p of every class by the reward classifier. It is compared with the truth, never used as it."""
    sample_ids: np.ndarray
    """(N,) int64: key of the sample's noise. Samples of two policies with the same id and prompt are a pair."""
    kl_per_step: np.ndarray | None = None
    """(N, T) float64 in nats, in sampling order; None where it was not measured."""
    log_ratio: np.ndarray | None = None
    """(N,) float64 in nats: log of the policy's density of the path over the pre-trained model's; None where it was not
    measured."""
    variance_cost: np.ndarray | None = None
    """(N,) float64 in nats: what fixed step variances cost on the path (`gradients.variance_cost`); None where it was not
    measured."""

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return int(self.images.shape[1]), int(self.images.shape[2])

    def __post_init__(self) -> None:
        n = len(self.images)
        expected = {
            "images": (self.images, np.uint8, self.images.ndim == 4 and self.images.shape[-1] == 3),
            "labels": (self.labels, np.int64, self.labels.ndim == 2),
            "kl": (self.kl, np.float64, self.kl.ndim == 1),
            "sample_ids": (self.sample_ids, np.int64, self.sample_ids.ndim == 1),
        }
        if self.kl_per_step is not None:
            expected["kl_per_step"] = (self.kl_per_step, np.float64, self.kl_per_step.ndim == 2)
        for name in ("log_ratio", "variance_cost"):
            if (values := getattr(self, name)) is not None:
                expected[name] = (values, np.float64, values.ndim == 1)
        for name, (array, dtype, shape_fits) in expected.items():
            if array.dtype != dtype or not shape_fits or len(array) != n:
                raise DataError(
                    f"evaluation samples: {name} is {array.dtype} {array.shape}; expected {np.dtype(dtype)} with one row "
                    f"for each of {n} images (images (N, H, W, 3), labels (N, C), kl and sample_ids (N,))"
                )
        lengths = {"prompts": len(self.prompts), **{k: len(v) for k, v in self.class_log_probs.items()}}
        for name, length in lengths.items():
            if length != n:
                raise DataError(f"evaluation samples: {name} has {length} rows for {n} images; expected as many")

    def __len__(self) -> int:
        return len(self.images)

    def select(self, rows: np.ndarray) -> EvaluationSamples:
        """The samples at `rows` (an index or boolean array)."""
        index = np.arange(len(self))[rows]
        return EvaluationSamples(
            images=self.images[index],
            prompts=tuple(self.prompts[i] for i in index),
            labels=self.labels[index],
            kl=self.kl[index],
            class_log_probs={name: values[index] for name, values in self.class_log_probs.items()},
            sample_ids=self.sample_ids[index],
            **{name: values[index] for name, values in _measured(self).items()},
        )

    def without_images(self) -> EvaluationSamples:
        """The same with images of no pixels: what statistics of paths and beliefs need."""
        return dataclasses.replace(self, images=np.empty((len(self), 0, 0, 3), np.uint8))


def _measured(samples: EvaluationSamples) -> dict[str, np.ndarray]:
    """Of what need not be measured, that which was."""
    values = {name: getattr(samples, name) for name in ("kl_per_step", "log_ratio", "variance_cost")}
    return {name: array for name, array in values.items() if array is not None}


def caption(prompt: str, controls: Sequence[str], labels: Sequence[int]) -> str:
    """What was asked of a sample, in words: its prompt and the class of each control."""
    asked = (f"{control}={label}" for control, label in zip(controls, labels, strict=True))
    return f"{prompt} · {', '.join(asked)}"


def concatenate(parts: Sequence[EvaluationSamples]) -> EvaluationSamples:
    """The samples of all parts, in order; the parts must hold the same controls and image size."""
    if not parts:
        raise DataError("no evaluation samples to join; expected at least one batch")
    measured = [_measured(part) for part in parts]
    return EvaluationSamples(
        images=np.concatenate([part.images for part in parts]),
        prompts=tuple(prompt for part in parts for prompt in part.prompts),
        labels=np.concatenate([part.labels for part in parts]),
        kl=np.concatenate([part.kl for part in parts]),
        class_log_probs={
            name: np.concatenate([part.class_log_probs[name] for part in parts]) for name in parts[0].class_log_probs
        },
        sample_ids=np.concatenate([part.sample_ids for part in parts]),
        **{name: np.concatenate([part[name] for part in measured]) for name in set.intersection(*map(set, measured))},
    )


def save_samples(samples: EvaluationSamples, path: str | Path) -> None:
    """Write the samples to one safetensors file (uncompressed; prompts are in its metadata)."""
    tensors = {name: getattr(samples, name) for name in ("images", "labels", "kl", "sample_ids")} | _measured(samples)
    tensors |= {_LOG_PROBS + name: values for name, values in samples.class_log_probs.items()}
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(contiguous, path, metadata={"prompts": json.dumps(samples.prompts)})


def load_samples(path: str | Path) -> EvaluationSamples:
    """The inverse of `save_samples`; DataError when the file is not one of its files."""
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            prompts = tuple(json.loads((file.metadata() or {})["prompts"]))
        log_probs = {name.removeprefix(_LOG_PROBS): tensors.pop(name) for name in list(tensors) if _LOG_PROBS in name}
        return EvaluationSamples(prompts=prompts, class_log_probs=log_probs, **tensors)
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise DataError(
            f"{path} does not hold evaluation samples ({error}); expected a file of save_samples"
        ) from error
