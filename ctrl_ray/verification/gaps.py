"""The certificate of each joint class, from samples that the comparison draws anyway (`evaluation.certificate`).

log Z(c, y) is the mean over prompts c of the log of each prompt's own mean where the pre-trained samples of each prompt are
enough for that; else it is pooled over prompts, an upper bound (Jensen), and the gap with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ctrl_ray.evaluation.certificate import certificate_summary, certify_targets, effective_sample_size
from ctrl_ray.verification.measured import Measured
from ctrl_ray.verification.target import JointClass, log_tilts

_FEWEST_EFFECTIVE = 20
"""Effective samples of a prompt at which log of a mean is too low by 1/40 nat on average."""


def certify_classes(
    pool: Measured, tuned: Measured, exponents: Mapping[str, float], classes: Sequence[JointClass]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(the certificate of each joint class, that of all fine-tuned samples together), as results.json holds them.

    `tuned` needs its log-ratios and at least two samples of each class. log_z_pooled: see above. too_wide: also where
    log Z rests on few pre-trained samples. The upper bound is not known: the pre-trained samples come without the policy's
    density of their paths.
    """
    assert tuned.log_ratio is not None
    asked = _index_of(tuned.labels, [joint.labels for joint in classes])
    tilts = log_tilts(tuned.class_log_probs, exponents, classes)
    log_weights = tilts[asked, np.arange(len(tuned))] - tuned.log_ratio
    prompts = sorted(set(pool.prompts))
    by_prompt = _tilts_by_prompt(log_tilts(pool.class_log_probs, exponents, classes), pool.prompts, prompts)
    effective = min(map(effective_sample_size, by_prompt.reshape(-1, by_prompt.shape[-1])))
    pooled = len(prompts) > 1 and effective < _FEWEST_EFFECTIVE
    if pooled:
        by_prompt, prompt = by_prompt.reshape(len(classes), 1, -1), np.zeros(len(tuned), dtype=np.int64)
    else:
        prompt = np.searchsorted(prompts, tuned.prompts)

    def certified(rows: np.ndarray) -> dict[str, Any]:
        wanted, targets = np.unique(asked[rows] * by_prompt.shape[1] + prompt[rows], return_inverse=True)
        of_targets = by_prompt.reshape(-1, by_prompt.shape[-1])[wanted]
        row = certificate_summary(certify_targets(log_weights[rows], targets, of_targets))
        row["pareto_k"] = row["pareto_k"] if math.isfinite(row["pareto_k"]) else None
        row["too_wide"] |= min(map(effective_sample_size, of_targets)) < _FEWEST_EFFECTIVE
        return {**row, "log_z_pooled": pooled}

    each = [certified(np.flatnonzero(asked == index)) for index in range(len(classes))]
    return each, certified(np.arange(len(tuned)))


def _index_of(labels: np.ndarray, of_classes: Sequence[tuple[int, ...]]) -> np.ndarray:
    """(N,) the joint class that each of (N, C) labels asks for."""
    known = {row: index for index, row in enumerate(of_classes)}
    return np.array([known[tuple(row)] for row in labels.tolist()], dtype=np.int64)


def _tilts_by_prompt(tilts: np.ndarray, of_samples: Sequence[str], prompts: Sequence[str]) -> np.ndarray:
    """(J, N) → (J, P, m): the first m samples of each of P prompts, m as many as each has."""
    known = np.array(of_samples)
    rows = [np.flatnonzero(known == prompt) for prompt in prompts]
    fewest = min(len(each) for each in rows)
    return tilts[:, np.stack([each[:fewest] for each in rows])]
