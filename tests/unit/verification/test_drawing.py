"""Drawing in parts that are kept: nothing is drawn twice, and nothing that belongs to another adapter is taken."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctrl_ray.config import SamplerConfig, ScalingConfig
from ctrl_ray.distributed.sampling import SamplingJob
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.verification.drawing import Drawer
from tests.unit.verification.samples import HUE, evaluation_samples, hue_log_probs


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """First id and number of what was sampled; a sample's strength is a function of its id."""
    ranges: list[tuple[int, int]] = []

    def sample_policy(job: SamplingJob, rewards: Any, scaling: Any) -> EvaluationSamples:
        ids = np.array(job.sample_ids)
        ranges.append((int(ids[0]), len(ids)))
        strength = ids % 97 / 97
        rng = np.random.default_rng(0)
        log_probs = {"hue": hue_log_probs(strength)}
        return evaluation_samples(strength, np.zeros(len(ids)), log_probs, rng, first_id=int(ids[0]))

    monkeypatch.setattr("ctrl_ray.verification.drawing.sample_policy", sample_policy)
    return ranges


@pytest.fixture
def drawer(tmp_path: Path) -> Drawer:
    """Of batches of two samples: parts of 32."""
    adapter, classifier = tmp_path / "adapter", tmp_path / "classifier"
    for folder in (adapter, classifier):
        folder.mkdir()
        (folder / "weights").write_text("1")
    job = SamplingJob(
        adapter=str(adapter),
        base_model="shapes",
        revision=None,
        controls={"hue": HUE},
        sampler=SamplerConfig(num_steps=2),
        prompts=("a",),
        sample_ids=(),
        seed=1,
        batch_size=2,
        reference=True,
    )
    rewards = RewardModelSpec(base_model="shapes", classifiers={"hue": str(classifier)})
    said: list[str] = []
    scaling, folder = ScalingConfig(), tmp_path / "samples"
    return Drawer(job=job, rewards=rewards, scaling=scaling, first_id=1000, folder=folder, say=said.append)


def test_only_what_is_missing_is_drawn(asked: list[tuple[int, int]], drawer: Drawer) -> None:
    """In the same process, and in one that starts anew; ids are consecutive throughout."""
    drawer.draw(40)
    assert asked == [(1000, 32), (1032, 8)]
    again = dataclasses.replace(drawer)
    samples = again.draw(50)
    assert asked[2:] == [(1040, 10)]
    assert samples.sample_ids.tolist() == list(range(1000, 1050))
    np.testing.assert_array_equal(samples.class_log_probs["hue"], hue_log_probs(samples.sample_ids % 97 / 97))
    assert len(again.draw(35)) == 35 and len(asked) == 3  # fewer are there already
    assert drawer.say.__self__[-1] == "50/50 pre-trained samples · 0 s left"  # type: ignore[attr-defined]


def test_a_lost_part_is_drawn_anew(asked: list[tuple[int, int]], drawer: Drawer) -> None:
    """With what followed it."""
    drawer.draw(80)
    (lost,) = drawer.folder.rglob("000000032.safetensors")
    lost.unlink()
    assert drawer.draw(80).sample_ids.tolist() == list(range(1000, 1080))
    assert asked[3:] == [(1032, 32), (1064, 16)]


@pytest.mark.parametrize("change", ["seed", "prompts", "fine-tuned", "adapter", "classifier", "batch size"])
def test_samples_of_another_question_are_not_taken(
    asked: list[tuple[int, int]], drawer: Drawer, change: str, tmp_path: Path
) -> None:
    """A batch size changes no sample, so it is the same question."""
    drawer.draw(8)
    changes: dict[str, dict[str, Any]] = {
        "seed": {"seed": 2},
        "prompts": {"prompts": ("b",)},
        "fine-tuned": {"reference": False},
        "batch size": {"batch_size": 4},
    }
    if change in ("adapter", "classifier"):
        os.utime(tmp_path / change / "weights", ns=(1, 1))
    other = dataclasses.replace(drawer, job=dataclasses.replace(drawer.job, **changes.get(change, {})))
    other.draw(8)
    assert len(asked) == (1 if change == "batch size" else 2)
