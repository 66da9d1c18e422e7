"""Samples whose law is known: an image is a pattern around a colour of a strength in [0, 1], and classifiers know it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ctrl_ray.config import ControlConfig
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.verification.measured import Measured

HUE = ControlConfig(thresholds=(80.0,), classes=("grey", "colourful"), oracle="colourfulness", guidance_strength=2.0)
LEVEL = ControlConfig(classes=("low", "middle", "high"))


def hue_log_probs(strength: np.ndarray) -> np.ndarray:
    """(N, 2): p(y=1) = sigmoid((strength − 0.5) 8)."""
    p = 1 / (1 + np.exp(-(strength - 0.5) * 8))
    return np.log(np.stack([1 - p, p], axis=1)).astype(np.float32)


def level_log_probs(strength: np.ndarray) -> np.ndarray:
    """(N, 3): a softmax of minus ten times the squared distance to 0, ½ and 1."""
    logits = -10 * (strength[:, None] - np.array([0.0, 0.5, 1.0])) ** 2
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def evaluation_samples(
    strength: np.ndarray,
    labels: np.ndarray,
    class_log_probs: Mapping[str, np.ndarray],
    rng: np.random.Generator,
    *,
    prompts: Sequence[str] = ("a",),
    first_id: int = 0,
    log_ratio: np.ndarray | None = None,
) -> EvaluationSamples:
    """Images of 16 × 16 noise around a colour; prompts in turn."""
    count = len(strength)
    base = np.array([200.0, 60.0, 60.0])
    images = base.mean() + strength[:, None, None, None] * (base - base.mean()) + rng.normal(0, 8, (count, 16, 16, 3))
    return EvaluationSamples(
        images=images.clip(0, 255).astype(np.uint8),
        prompts=tuple(prompts[i % len(prompts)] for i in range(count)),
        labels=labels.reshape(count, -1).astype(np.int64),
        kl=np.full(count, np.nan),
        class_log_probs=class_log_probs,
        sample_ids=np.arange(first_id, first_id + count),
        log_ratio=log_ratio,
    )


def without_images(
    strength: np.ndarray,
    labels: np.ndarray,
    class_log_probs: Mapping[str, np.ndarray],
    *,
    prompts: Sequence[str] = ("a",),
    first_id: int = 0,
    log_ratio: np.ndarray | None = None,
) -> Measured:
    """Samples of which the strength is all that was measured; it is their only feature too. Prompts in turn."""
    count = len(strength)
    return Measured(
        prompts=tuple(prompts[i % len(prompts)] for i in range(count)),
        sample_ids=np.arange(first_id, first_id + count),
        labels=labels.reshape(count, -1).astype(np.int64),
        class_log_probs=class_log_probs,
        values={"strength": strength},
        features=strength[:, None].astype(np.float32),
        log_ratio=log_ratio,
    )
