"""Drawn samples whose true classes are known, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ctrl_ray.config import ControlConfig
from ctrl_ray.evaluation.brisque import NUM_FEATURES
from ctrl_ray.evaluation.samples import EvaluationSamples

CONTROL = ControlConfig(thresholds=(64.0, 128.0), classes=("dark", "grey", "light"), unit="of 255", oracle="jpeg_size")


def brightness(image: Image.Image) -> float:
    """The mean of the pixels, 0 to 255."""
    return float(np.asarray(image).mean())


def flat_samples(values: list[int], labels: list[int], *, log_probs: np.ndarray | None = None) -> EvaluationSamples:
    """Flat 64 x 64 images, one of each brightness, so that `brightness` and its class are known by hand."""
    count = len(values)
    images = np.empty((count, 64, 64, 3), dtype=np.uint8)
    for image, value in zip(images, values, strict=True):
        image[:] = value
    return EvaluationSamples(
        images=images,
        prompts=tuple("a red circle" if i % 2 else "a <b>blue</b> & 'square'" for i in range(count)),
        labels=np.array(labels, dtype=np.int64)[:, None],
        kl=np.arange(count, dtype=np.float64),
        class_log_probs={} if log_probs is None else {"light": log_probs},
        sample_ids=np.arange(count, dtype=np.int64),
        kl_per_step=np.full((count, 4), 0.25),
    )


def write_model(folder: Path, *, rho: float = -50.0) -> None:
    """A folder of BRISQUE's: two support vectors, at 0 and at (1, 0, …), and features that are scaled from 0 … 2 to -1 … 1."""
    (folder / "allmodel").write_text(
        f"svm_type epsilon_svr\nkernel_type rbf\ngamma 0.5\nnr_class 2\ntotal_sv 2\nrho {rho}\nSV\n10 \n-4 1:1 36:0\n"
    )
    ranges = "".join(f"{number} 0 2\n" for number in range(1, NUM_FEATURES + 1))
    (folder / "allrange").write_text(f"x\n-1 1\n{ranges}")
