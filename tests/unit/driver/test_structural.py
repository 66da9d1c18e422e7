"""Which pairs are drawn for the structural parts of the gap, and what is made of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ctrl_ray.config import ControlConfig, EvaluationConfig, SamplerConfig, TrainConfig
from ctrl_ray.driver import structural
from ctrl_ray.driver.structural import measure_structural
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.evaluation.structural import initial_noise_part, reference_steps_part

CONTROLS = {"size": ControlConfig(classes=("small", "large"), guidance_strength=4.0)}
LABELS = np.array([[0], [1], [1], [1]])


def _samples(count: int, seed: int) -> EvaluationSamples:
    return EvaluationSamples(
        images=np.empty((count, 0, 0, 3), np.uint8),
        prompts=("a cross",) * count,
        labels=np.zeros((count, 1), dtype=np.int64),
        kl=np.zeros(count),
        class_log_probs={"size": np.log(np.random.default_rng(seed).dirichlet((1, 1), size=count))},
        sample_ids=np.arange(count),
    )


def _measured(
    monkeypatch: pytest.MonkeyPatch, reference_steps: int, num_pairs: int = 16
) -> tuple[dict[str, Any], list]:
    """(the parts, the jobs that were sampled)."""
    jobs: list[Any] = []

    def sample_policy(job: Any, *_: Any) -> EvaluationSamples:
        jobs.append(job)
        return _samples(len(job.sample_ids), 1)

    monkeypatch.setattr(structural, "sample_policy", sample_policy)
    config = TrainConfig(
        controls=CONTROLS,
        kl_coef=2.0,
        sampler=SamplerConfig(num_steps=10, reference_steps=reference_steps),
        evaluation=EvaluationConfig(num_pairs=num_pairs),
    )
    checked: Any = SimpleNamespace(config=config, controls=CONTROLS, evaluation_prompts=("a cross",))
    return measure_structural(checked, cast(Any, None), _samples(32, 0), LABELS), jobs


def test_pairs_part_at_the_start_and_before_the_reference_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, jobs = _measured(monkeypatch, reference_steps=2)
    assert [(job.fork_at, len(job.sample_ids), job.with_images, job.reference) for job in jobs] == [
        (0, 16, False, True),
        (8, 16, False, True),
    ]
    first, second = (2.0 * _samples(count, seed).class_log_probs["size"][:16].T for count, seed in ((32, 0), (16, 1)))
    for name, part in (("initial_noise", initial_noise_part), ("reference_steps", reference_steps_part)):
        small, large = (part(first[label], second[label])[0] for label in (0, 1))
        assert parts[name]["value"] == pytest.approx(0.25 * small + 0.75 * large)


def test_only_what_there_is_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, jobs = _measured(monkeypatch, reference_steps=0)
    assert list(parts) == ["initial_noise"] and len(jobs) == 1
    assert _measured(monkeypatch, reference_steps=2, num_pairs=0) == ({}, [])
