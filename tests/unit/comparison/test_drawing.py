"""What is drawn is kept in parts and never drawn again; two jobs share parts only where their images are the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctrl_ray.baselines.dps import DPS
from ctrl_ray.comparison import drawing
from ctrl_ray.comparison.cost import Cost
from ctrl_ray.comparison.drawing import Desk, job_of
from ctrl_ray.comparison.methods import Setting
from ctrl_ray.config import ControlConfig, SamplerConfig, ScalingConfig
from ctrl_ray.config.method import MethodConfig
from ctrl_ray.distributed import sampling
from ctrl_ray.distributed.sampling import SamplingJob
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.gradients.rollout import rollout
from ctrl_ray.rewards.model import RewardModelSpec


def job(count: int = 40, **changes: Any) -> SamplingJob:
    known: dict[str, Any] = {
        "adapter": None,
        "base_model": "shapes",
        "revision": None,
        "controls": {"jpeg_size": ControlConfig(classes=("a", "b"))},
        "sampler": SamplerConfig(),
        "prompts": ("a red circle",),
        "sample_ids": tuple(range(100, 100 + count)),
        "seed": 1,
        "batch_size": 8,
        "reference": True,
    }
    return SamplingJob(**(known | changes))


class Ray:
    """In place of the cluster: an image tells its id."""

    def __init__(self) -> None:
        self.drawn: list[tuple[int, ...]] = []
        self.ends_after: int | None = None

    def __call__(self, job: SamplingJob, rewards: object, scaling: object) -> EvaluationSamples:
        if self.ends_after is not None and len(self.drawn) == self.ends_after:
            raise KeyboardInterrupt
        self.drawn.append(job.sample_ids)
        ids = np.array(job.sample_ids, dtype=np.int64)
        return EvaluationSamples(
            images=np.broadcast_to(ids.astype(np.uint8)[:, None, None, None], (len(ids), 2, 2, 3)).copy(),
            prompts=("a red circle",) * len(ids),
            labels=(ids % 2)[:, None],
            kl=np.zeros(len(ids)),
            sample_ids=ids,
        )


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Ray:
    ray = Ray()
    monkeypatch.setattr(drawing, "sample_policy", ray)
    return ray


def desk(folder: Path, told: list[tuple[float, bool]] | None = None, classifier: str = "c") -> Desk:
    def drawn(units: float, seconds: float | None) -> None:
        if told is not None:
            told.append((units, seconds is not None))

    rewards = RewardModelSpec(base_model="shapes", classifiers={"jpeg_size": classifier})
    return Desk(rewards=rewards, scaling=ScalingConfig(), folder=folder, drawn=drawn, timing_s=1.0)


def test_a_killed_drawing_goes_on_with_the_part_it_was_at(tmp_path: Path, cluster: Ray) -> None:
    """Parts of 16 at this cost; the second process draws the last ones only, and the images are those of one that ran on."""
    cost = drawing.PART_UNITS / 16
    cluster.ends_after = 2
    with pytest.raises(KeyboardInterrupt):
        desk(tmp_path).draw(job(), cost)
    assert [ids[0] for ids in cluster.drawn] == [100, 116]
    cluster.ends_after, told = None, []
    samples = desk(tmp_path, told).draw(job(), cost)
    assert cluster.drawn[2:] == [tuple(range(132, 140))]
    assert samples.sample_ids.tolist() == list(range(100, 140))
    assert samples.images[:, 0, 0, 0].tolist() == list(range(100, 140))
    assert told == [(16 * cost, False), (16 * cost, False), (8 * cost, True)]


def test_what_is_there_is_not_drawn_again(tmp_path: Path, cluster: Ray) -> None:
    """Whatever the batch size, and by another method of the same settings."""
    desk(tmp_path).draw(job(), 1.0)
    desk(tmp_path).draw(job(batch_size=3), 1.0)
    assert len(cluster.drawn) == 1


def test_a_file_that_is_half_written_is_not_one(tmp_path: Path, cluster: Ray) -> None:
    """A draft of a killed process."""
    folder = tmp_path / "samples" / desk(tmp_path).key(job())
    folder.mkdir(parents=True)
    (folder / "100-40.safetensors.draft").write_bytes(b"half")
    assert len(desk(tmp_path).draw(job(), 1.0)) == 40 and len(cluster.drawn) == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 2},
        {"prompts": ("a blue circle",)},
        {"draw": DPS(exponents=(4.0,))},
        {"adapter_scale": 0.9},
        {"sampler": SamplerConfig(num_steps=11)},
        {"reference": False},
    ],
)
def test_jobs_of_other_images_have_parts_of_their_own(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert desk(tmp_path).key(job(**changes)) != desk(tmp_path).key(job())


def test_samplers_of_other_settings_have_parts_of_their_own(tmp_path: Path) -> None:
    keys = {desk(tmp_path).key(job(draw=DPS(exponents=(4.0,), scale=scale))) for scale in (1.0, 2.0, 1.0)}
    assert len(keys) == 2


def test_a_key_is_the_same_in_another_process(tmp_path: Path) -> None:
    """A function's address is no part of it."""
    found = desk(tmp_path).key(job(draw=rollout))
    moved = desk(tmp_path).key(dataclasses.replace(job(), draw=rollout, sample_ids=(1,)))
    assert found == moved
    assert "0x" not in json.dumps(getattr(rollout, "__qualname__", None))


def test_another_classifier_or_adapter_is_seen_by_its_files(tmp_path: Path) -> None:
    """Also one that was written anew in the same place."""
    folder = tmp_path / "classifier"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    first = desk(tmp_path, classifier=str(folder)).key(job())
    (folder / "model.safetensors").write_bytes(b"other")
    assert desk(tmp_path, classifier=str(folder)).key(job()) != first


def test_a_setting_makes_a_job() -> None:
    """The sampler gets the exponents; a trained policy is no reference, and a scale of the label reaches the guidance."""
    guided = job_of(job(), Setting(method=MethodConfig(name="dps", scale=0.3)), None, (4.0,))
    assert guided.draw == DPS(exponents=(4.0,), scale=0.3) and guided.reference
    trained = job_of(job(), Setting(adapter_scale=0.9, control_scale=2.0), "/adapter", (4.0,))
    assert trained.draw is rollout and (trained.adapter, trained.reference) == ("/adapter", False)
    assert (trained.adapter_scale, trained.sampler.control_scale) == (0.9, 2.0)
    assert job_of(job(), Setting(), None, (4.0,)).sampler == job().sampler


def test_a_cost_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read again as it was."""
    cost = Cost(
        seconds=0.2,
        plain_seconds=0.1,
        ratio=2.0,
        ratio_range=(1.9, 2.1),
        num_pairs=3,
        batch_size=16,
        calls={"calls": 10, "forwards": 10.0},
    )
    asked = []

    class Task:
        def remote(self, *arguments: Any) -> Cost:
            asked.append(arguments)
            return cost

    monkeypatch.setattr(drawing, "sampling_task", lambda function, scaling: Task())
    monkeypatch.setattr(drawing.ray, "get", lambda found: found)
    for module in (drawing, sampling):
        monkeypatch.setattr(module, "copies_of", lambda folders: {})
    assert [desk(tmp_path).time(job(), job()) for _ in range(2)] == [cost, cost]
    assert len(asked) == 1 and asked[0][3] == "cpu"
