"""The pre-trained model's samples: drawn once, kept with the run, drawn anew where they no longer fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from ctrl_ray.config import ControlConfig, EvaluationConfig, TrainConfig
from ctrl_ray.driver import pre_trained
from ctrl_ray.driver.pre_trained import PRE_TRAINED_FILE, PreTrained, sample_pre_trained
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.runs.folder import RunFolder

CONTROLS = {"size": ControlConfig(classes=("small", "large"))}


def _checked(*prompts: str, log_z_samples: int = 8, **changes: Any) -> Any:
    settings = EvaluationConfig(final_num_samples=4, log_z_samples=log_z_samples, max_log_z_samples=log_z_samples)
    config = dataclasses.replace(TrainConfig(controls=CONTROLS, evaluation=settings), **changes)
    return SimpleNamespace(config=config, controls=CONTROLS, evaluation_prompts=prompts)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of samples that were drawn, in turn."""
    turns: list[int] = []

    def sample_policy(job: Any, *_: Any) -> EvaluationSamples:
        turns.append(len(job.sample_ids))
        count = len(job.sample_ids)
        return EvaluationSamples(
            images=np.ones((count, 2, 2, 3), np.uint8)[:, : 2 * job.with_images, : 2 * job.with_images],
            prompts=(job.prompts[0],) * count,
            labels=np.zeros((count, 1), dtype=np.int64),
            kl=np.zeros(count),
            class_log_probs={"size": np.full((count, 2), np.log(0.5))},
            sample_ids=np.array(job.sample_ids, dtype=np.int64),
        )

    monkeypatch.setattr(pre_trained, "sample_policy", sample_policy)
    monkeypatch.setattr("ctrl_ray.distributed.log_z.sample_policy", sample_policy)
    return turns


def _sample(checked: Any, folder: Path, known: PreTrained | None = None) -> PreTrained:
    return sample_pre_trained(checked, RunFolder(str(folder)), cast(Any, None), known)


def test_a_resumed_run_reads_what_was_drawn(tmp_path: Path, asked: list[int]) -> None:
    first = _sample(_checked("a cross"), tmp_path)
    assert asked == [4, 4] and first.shown is not None and first.scored is not None
    assert first.shown.images.size and len(first.shown) == 4
    assert not first.scored.images.size and len(first.scored) == 8
    again = _sample(_checked("a cross"), tmp_path)
    assert asked == [4, 4] and again.shown is None and again.scored is not None
    np.testing.assert_array_equal(again.scored.sample_ids, first.scored.sample_ids)


@pytest.mark.parametrize(
    "other",
    [_checked("a ring"), _checked("a cross", log_z_samples=12)],
    ids=["other prompts", "too few"],
)
def test_what_no_longer_fits_is_drawn_anew(tmp_path: Path, asked: list[int], other: Any) -> None:
    _sample(_checked("a cross"), tmp_path)
    drawn = _sample(other, tmp_path)
    assert drawn.scored is not None and len(drawn.scored) == other.config.evaluation.log_z_samples
    assert set(drawn.scored.prompts) == set(other.evaluation_prompts)


def test_a_damaged_file_is_drawn_anew(tmp_path: Path, asked: list[int]) -> None:
    (tmp_path / PRE_TRAINED_FILE).write_bytes(b"torn")
    assert _sample(_checked("a cross"), tmp_path).scored is not None and sum(asked) == 8


def test_a_trial_draws_only_what_its_sweep_has_not(tmp_path: Path, asked: list[int]) -> None:
    sweep = _sample(_checked("a cross"), tmp_path / "sweep")
    trial = _sample(_checked("a cross", log_z_samples=12), tmp_path / "trial", sweep)
    assert asked == [4, 4, 4] and trial.scored is not None and len(trial.scored) == 12


@pytest.mark.parametrize("changes", [{"kl_coef": 0.0}, {"latent_reduction": "mean"}])
def test_without_a_target_there_is_nothing_to_draw(tmp_path: Path, asked: list[int], changes: dict[str, Any]) -> None:
    assert _sample(_checked("a cross", **changes), tmp_path) == PreTrained() and asked == []
