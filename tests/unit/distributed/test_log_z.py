"""How many samples of the pre-trained model are drawn, and which."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from ctrl_ray.config import ControlConfig, EvaluationConfig, SamplerConfig, ScalingConfig
from ctrl_ray.distributed import log_z
from ctrl_ray.distributed.log_z import draw_for_log_z
from ctrl_ray.distributed.sampling import SamplingJob, evaluation_ids
from ctrl_ray.evaluation.certificate import log_z_errors
from ctrl_ray.evaluation.samples import EvaluationSamples

CONTROLS = {"size": ControlConfig(classes=("small", "large"), guidance_strength=4.0)}
JOB = SamplingJob(
    adapter=None,
    base_model="shapes",
    revision=None,
    controls=CONTROLS,
    sampler=SamplerConfig(),
    prompts=("a cross",),
    sample_ids=(),
    seed=0,
    batch_size=8,
    reference=True,
)


def _samples(ids: tuple[int, ...]) -> EvaluationSamples:
    """Beliefs that depend on the sample's id alone."""
    beliefs = np.stack([np.random.default_rng(number).dirichlet((1, 1)) for number in ids])
    return EvaluationSamples(
        images=np.empty((len(ids), 0, 0, 3), np.uint8),
        prompts=("a cross",) * len(ids),
        labels=np.zeros((len(ids), 1), dtype=np.int64),
        kl=np.zeros(len(ids)),
        class_log_probs={"size": np.log(beliefs)},
        sample_ids=np.array(ids, dtype=np.int64),
    )


def _draw(
    monkeypatch: pytest.MonkeyPatch, first: int, settings: EvaluationConfig
) -> tuple[EvaluationSamples, list[int]]:
    """(samples, how many were drawn in each turn)."""
    turns: list[int] = []

    def sample_policy(job: SamplingJob, rewards: Any, scaling: Any) -> EvaluationSamples:
        assert not job.with_images and job.reference
        turns.append(len(job.sample_ids))
        return _samples(job.sample_ids)

    monkeypatch.setattr(log_z, "sample_policy", sample_policy)
    start = _samples(tuple(evaluation_ids(first)))
    drawn = draw_for_log_z(start, JOB, cast(Any, None), ScalingConfig(), CONTROLS, 1.0, settings)
    return drawn, turns


def test_they_go_on_from_the_first_until_log_z_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = EvaluationConfig(log_z_samples=32, max_log_z_samples=4096, log_z_standard_error=0.05)
    drawn, turns = _draw(monkeypatch, 16, settings)
    assert drawn.sample_ids.tolist() == list(evaluation_ids(len(drawn)))
    errors = log_z_errors(CONTROLS, 1.0, drawn.class_log_probs)
    # p uniform on [0, 1]: p^4 has the coefficient of variation 4/3, whatever the class
    np.testing.assert_allclose(errors, 4 / 3 / np.sqrt(len(drawn)), rtol=0.1)
    assert errors.max() <= 0.05 and len(drawn) < 2 * (4 / 3 / 0.05) ** 2
    assert 1 <= len(turns) <= 4 and sum(turns) + 16 == len(drawn)


@pytest.mark.parametrize(
    ("first", "settings", "expected"),
    [
        (16, EvaluationConfig(log_z_samples=32, max_log_z_samples=64, log_z_standard_error=1e-3), 64),
        (16, EvaluationConfig(log_z_samples=32, max_log_z_samples=64, log_z_standard_error=10.0), 32),
        (128, EvaluationConfig(log_z_samples=32, max_log_z_samples=64, log_z_standard_error=1e-3), 128),
    ],
    ids=["at most", "at least", "no fewer than there are"],
)
def test_bounds(monkeypatch: pytest.MonkeyPatch, first: int, settings: EvaluationConfig, expected: int) -> None:
    assert len(_draw(monkeypatch, first, settings)[0]) == expected


def test_every_combination_of_classes_has_its_error() -> None:
    controls = CONTROLS | {"colour": ControlConfig(classes=("red", "green", "blue"), guidance_strength=1.0)}
    rng = np.random.default_rng(0)
    probs = {"size": np.log(rng.dirichlet((1, 1), size=64)), "colour": np.log(rng.dirichlet((1, 1, 1), size=64))}
    errors = log_z_errors(controls, 2.0, probs)
    assert errors.shape == (6,)
    weights = np.exp(2 * probs["size"][:, 1] + 0.5 * probs["colour"][:, 0])
    # to the delta method: relative spread of the mean
    assert errors[3] == pytest.approx(weights.std() / weights.mean() / np.sqrt(64))
