"""A fine-tuned sampler against exact samples of its target, which rejection gives at strength 1.

A pool of pre-trained samples x with y drawn from the classifier p(y|x,c) holds, among those with y = k, exact samples of
p_pre(x|c) p(k|x,c) / Z: what CTRL promises for guidance_strength = kl_coef. Each distance to them is shown beside the
same distance between two disjoint halves of them, the noise floor.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import ks_2samp, wasserstein_distance

from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import DataError
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.oracles import colourfulness, load_oracle, measure
from ctrl_ray.reporting.figures import AFTER, BEFORE, new_figure

Distance = Callable[[np.ndarray, np.ndarray], float]
_SMALL_SIDE = 16


@dataclass(frozen=True)
class Comparison:
    """One distance of one class."""

    label: int
    statistic: str
    distance: str
    reached: float
    """Fine-tuned against rejection samples, mean over the bootstraps."""
    floor: float
    """Rejection samples against rejection samples."""
    before: float
    """All pre-trained samples against rejection samples: where the fine-tuning started."""
    num_samples: int
    """Samples on each side."""

    @property
    def ratio(self) -> float:
        """reached / floor; 1 is as good as exact."""
        return self.reached / self.floor if self.floor > 0 else math.inf


def draw_labels(samples: EvaluationSamples, control: str, seed: int) -> np.ndarray:
    """y ~ p(y|x,c) of the control's classifier for every sample, (N,)."""
    cumulative = np.exp(samples.class_log_probs[control]).cumsum(axis=1)
    uniform = np.random.default_rng(seed).uniform(size=(len(samples), 1))
    return np.minimum((uniform * cumulative[:, -1:] > cumulative).sum(axis=1), cumulative.shape[1] - 1)


def compare(
    pool: EvaluationSamples,
    tuned: EvaluationSamples,
    control: str,
    config: ControlConfig,
    *,
    column: int = 0,
    seed: int = 0,
    num_bootstraps: int = 20,
) -> list[Comparison]:
    """Distances of each class between `tuned` (labels: what was asked) and the pool's rejection samples.

    Raises DataError where a class has fewer than 20 samples on a side.
    """
    rng = np.random.default_rng(seed)
    drawn = draw_labels(pool, control, seed)
    pool_statistics = _statistics(pool, control, config)
    tuned_statistics = _statistics(tuned, control, config)
    comparisons = []
    for label in range(config.num_classes):
        exact, reached = np.flatnonzero(drawn == label), np.flatnonzero(tuned.labels[:, column] == label)
        size = min(len(exact) // 2, len(reached))
        if size < 10:
            raise DataError(
                f"class {label} of {control} has {len(exact)} rejection samples and {len(reached)} of the adapter; "
                "expected at least 20 of each. Draw more with --num-samples"
            )
        draws = [_Draw.make(rng, exact, reached, len(pool), size) for _ in range(num_bootstraps)]
        for statistic, distances in _DISTANCES.items():
            for name, distance in distances.items():
                of_pool, of_tuned = pool_statistics(statistic, label), tuned_statistics(statistic, label)
                count = 3 if statistic == "features" else num_bootstraps
                values = np.array(
                    [
                        (
                            distance(of_tuned[draw.reached], of_pool[draw.exact]),
                            distance(of_pool[draw.other], of_pool[draw.exact]),
                            distance(of_pool[draw.any], of_pool[draw.exact]),
                        )
                        for draw in draws[:count]
                    ]
                ).mean(axis=0)
                reached_at, floor, before = values.tolist()
                comparisons.append(Comparison(label, statistic, name, reached_at, floor, before, size))
    return comparisons


@dataclass(frozen=True)
class _Draw:
    """Row numbers of one bootstrap; `exact` and `other` are disjoint."""

    exact: np.ndarray
    other: np.ndarray
    reached: np.ndarray
    any: np.ndarray

    @classmethod
    def make(cls, rng: np.random.Generator, exact: np.ndarray, reached: np.ndarray, total: int, size: int) -> _Draw:
        shuffled = rng.permutation(exact)
        return cls(
            shuffled[:size],
            shuffled[size : 2 * size],
            rng.choice(reached, size, replace=False),
            rng.choice(total, size, replace=False),
        )


def mmd(one: np.ndarray, other: np.ndarray) -> float:
    """Maximum mean discrepancy (Gretton et al. 2012, eq. 5, V-statistic's root), RBF kernel at the median distance."""
    both = np.concatenate([one, other]).astype(np.float32)
    squares = (both**2).sum(1)
    distances = np.maximum(squares[:, None] + squares[None, :] - 2 * both @ both.T, 0)
    kernel = np.exp(-distances / np.median(distances[distances > 0]))
    n = len(one)
    value = kernel[:n, :n].mean() + kernel[n:, n:].mean() - 2 * kernel[:n, n:].mean()
    return float(math.sqrt(max(0.0, float(value))))


def image_features(images: np.ndarray) -> np.ndarray:
    """A fixed feature space: 16 × 16 mean colours and the contrast inside each of these blocks, (N, 1024) in [0, 1]."""
    count, height, width, _ = images.shape
    if height % _SMALL_SIDE or width % _SMALL_SIDE:
        images = np.stack([np.asarray(Image.fromarray(image).resize((64, 64))) for image in images])
        height = width = 64
    blocks = images.reshape(count, _SMALL_SIDE, height // _SMALL_SIDE, _SMALL_SIDE, width // _SMALL_SIDE, 3) / 255.0
    means = blocks.mean(axis=(2, 4)).reshape(count, -1)
    contrast = blocks.mean(axis=-1).std(axis=(2, 4)).reshape(count, -1)
    return np.concatenate([means, contrast], axis=1).astype(np.float32)


def texture(images: np.ndarray) -> np.ndarray:
    """Mean absolute difference of neighbouring grey values, (N,) in [0, 255]."""
    grey = images.astype(np.float32).mean(axis=-1)
    return np.abs(np.diff(grey, axis=1)).mean(axis=(1, 2)) + np.abs(np.diff(grey, axis=2)).mean(axis=(1, 2))


def _statistics(samples: EvaluationSamples, control: str, config: ControlConfig) -> Callable[[str, int], np.ndarray]:
    values: dict[str, np.ndarray] = {
        "colourfulness": measure(colourfulness, samples.images),
        "texture": texture(samples.images),
        "features": image_features(samples.images),
    }
    if config.oracle:
        values["measured"] = measure(load_oracle(config.oracle), samples.images)
    log_probs = samples.class_log_probs[control]

    def of(statistic: str, label: int) -> np.ndarray:
        return log_probs[:, label] if statistic == "log_prob" else values[statistic]

    return of


def _ks(one: np.ndarray, other: np.ndarray) -> float:
    return float(ks_2samp(one, other).statistic)


def _wasserstein(one: np.ndarray, other: np.ndarray) -> float:
    return float(wasserstein_distance(one, other))


_DISTANCES: dict[str, dict[str, Distance]] = {
    "measured": {"Wasserstein": _wasserstein, "Kolmogorov–Smirnov": _ks},
    "log_prob": {"Wasserstein": _wasserstein},
    "colourfulness": {"Wasserstein": _wasserstein},
    "texture": {"Wasserstein": _wasserstein},
    "features": {"MMD": mmd},
}


def format_comparisons(comparisons: Sequence[Comparison], classes: Sequence[str]) -> str:
    """class · statistic · distance · reached · noise floor · ratio · before."""
    lines = [f"{'class':<14} {'statistic':<14} {'distance':<19} {'reached':>9} {'floor':>9} {'ratio':>7} {'before':>9}"]
    lines += [
        f"{classes[c.label]:<14} {c.statistic:<14} {c.distance:<19} {c.reached:9.3f} {c.floor:9.3f} {c.ratio:7.2f} "
        f"{c.before:9.3f}"
        for c in comparisons
    ]
    return "\n".join(lines)


def plot_rejection(
    path: Path,
    pool: EvaluationSamples,
    tuned: EvaluationSamples,
    control: str,
    config: ControlConfig,
    *,
    column: int = 0,
    seed: int = 0,
) -> Path:
    """Per class: the oracle's value of pre-trained, rejection and fine-tuned samples."""
    drawn = draw_labels(pool, control, seed)
    assert config.oracle
    of_pool, of_tuned = (measure(load_oracle(config.oracle), samples.images) for samples in (pool, tuned))
    bins = np.linspace(float(np.percentile(of_pool, 0.2)), float(np.percentile(of_pool, 99.8)), 60)
    with new_figure(path, 7.2, 1.55 * config.num_classes + 0.7) as figure:
        axes = np.atleast_1d(figure.subplots(config.num_classes, 1, sharex=True))
        for label, axis in enumerate(axes):
            style: Any = {"density": True, "histtype": "step"}
            axis.hist(of_pool, bins, color=BEFORE, label="pre-trained", linewidth=0.8, **style)
            axis.hist(
                of_pool[drawn == label], bins, color="#c7791a", alpha=0.45, density=True, label="exact (rejection)"
            )
            axis.hist(
                of_tuned[tuned.labels[:, column] == label],
                bins,
                color=AFTER,
                label="fine-tuned",
                linewidth=1.4,
                **style,
            )
            axis.set_ylabel(f"{config.class_names[label]}\ndensity", fontsize=8)
            axis.set_yticks([])
        axes[-1].set_xlabel(f"{control} / {config.unit}" if config.unit else control)
        axes[0].legend(loc="upper right", ncols=3)
    return path


def summary_of(comparisons: Sequence[Comparison]) -> list[Mapping[str, Any]]:
    """The comparisons as plain data."""
    return [{**dataclasses.asdict(item), "ratio": item.ratio} for item in comparisons]
