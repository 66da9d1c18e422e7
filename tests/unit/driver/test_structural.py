"""Which pairs are drawn for the structural parts of the gap, and what is made of them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ctrl_ray.config import ControlConfig, EvaluationConfig, SamplerConfig, ScalingConfig, TrainConfig
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
    monkeypatch: pytest.MonkeyPatch, reference_steps: int, num_pairs: int = 20
) -> tuple[dict[str, Any], list]:
    """(the parts, the jobs that were sampled)."""
    jobs: list[Any] = []

    def sample_policy(job: Any, *_: Any) -> EvaluationSamples:
        jobs.append(job)
        samples = _samples(len(job.sample_ids), 1)
        return samples if job.reference else dataclasses.replace(samples, variance_cost=samples.sample_ids * 1.0)

    monkeypatch.setattr(structural, "sample_policy", sample_policy)
    config = TrainConfig(
        controls=CONTROLS,
        kl_coef=2.0,
        sampler=SamplerConfig(num_steps=10, reference_steps=reference_steps),
        micro_batch_size_per_worker=3,
        scaling=ScalingConfig(gradient_checkpointing=True),
        evaluation=EvaluationConfig(num_pairs=num_pairs),
    )
    checked: Any = SimpleNamespace(config=config, controls=CONTROLS, evaluation_prompts=("a cross",))
    return measure_structural(checked, cast(Any, None), "adapter", _samples(32, 0), LABELS), jobs


def test_pairs_part_at_the_start_and_before_the_reference_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, (variances, *jobs) = _measured(monkeypatch, reference_steps=2)
    assert (variances.adapter, variances.reference, variances.variance_cost_at) == ("adapter", False, 2.0)
    assert (variances.batch_size, variances.gradient_checkpointing) == (3, True), "what fits in training fits here"
    assert parts["fixed_variances"] == pytest.approx({"value": 0.5, "standard_error": 0.5})  # of 0, 1
    assert [(job.fork_at, len(job.sample_ids), job.with_images, job.reference) for job in jobs] == [
        (0, 20, False, True),
        (8, 5, False, True),
    ]
    for name, part, count in (("initial_noise", initial_noise_part, 20), ("reference_steps", reference_steps_part, 5)):
        first, second = (2.0 * _samples(n, seed).class_log_probs["size"][:count].T for n, seed in ((32, 0), (count, 1)))
        small, large = (part(first[label], second[label])[0] for label in (0, 1))
        assert parts[name]["value"] == pytest.approx(0.25 * small + 0.75 * large)


def test_only_what_there_is_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    parts, jobs = _measured(monkeypatch, reference_steps=0)
    assert list(parts) == ["fixed_variances", "initial_noise"] and len(jobs) == 2
    assert _measured(monkeypatch, reference_steps=2, num_pairs=0) == ({}, [])
