"""What a sampling task loads, and what it tells of pre-trained paths."""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ctrl_ray.baselines.classifier_guidance import ClassifierGuidance
from ctrl_ray.config import ControlConfig, SamplerConfig
from ctrl_ray.distributed import sampling
from ctrl_ray.distributed.batches import Batch
from ctrl_ray.distributed.sampling import (
    SamplingJob,
    _log_tilt,
    _sample_part,
    drawing_of,
    job_noise,
    load_policy,
    with_copies,
)
from ctrl_ray.gradients.rollout import rollout
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.runs.copies import FolderCopy
from tests.classifiers import save_classifier
from tests.unit.test_pipeline import CONTROLS, _export


def _job(**changes: Any) -> SamplingJob:
    """One sample of the pre-trained model."""
    settings: dict[str, Any] = {
        "adapter": None,
        "base_model": "shapes",
        "revision": None,
        "controls": {"size": ControlConfig(classes=("low", "high"))},
        "sampler": SamplerConfig(num_steps=2),
        "prompts": ("a cross",),
        "sample_ids": (0,),
        "seed": 0,
        "batch_size": 1,
        "reference": True,
    }
    return SamplingJob(**{**settings, **changes})


def test_the_pretrained_model_is_in_memory_once(tiny_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy without adapter has no second denoiser to compare with (1.7 GB of Stable Diffusion 1.5 in half precision)."""

    deepcopy = copy.deepcopy

    def watched(value: Any, memo: Any = None) -> Any:
        assert not isinstance(value, nn.Module), "a denoiser was copied"
        return deepcopy(value, memo)

    monkeypatch.setattr(copy, "deepcopy", watched)
    job = _job(base_model=str(tiny_pipeline))
    policy, controls, _ = load_policy(job)
    assert policy.reference_denoiser is None and list(controls) == ["size"]
    assert [name for name in policy.trainable_parameters() if not name.startswith("controls.")] == []


@pytest.mark.parametrize(("fork_at", "shared"), [(None, 4), (0, 1), (2, 3)])
def test_a_fork_shares_the_noise_of_the_steps_before_it(fork_at: int | None, shared: int) -> None:
    """Of the initial noise and three steps' the first so many; ids keep their own."""
    job = _job(fork_at=fork_at)
    noises = [job_noise(one, (5, 7), (2, 2), 3, "cpu") for one in (_job(), job)]
    same = [torch.equal(noises[0](index), noises[1](index)) for index in range(4)]
    assert same == [True] * shared + [False] * (4 - shared)
    assert not torch.equal(noises[1](3)[0], noises[1](3)[1])


def test_the_folders_of_a_sampler_travel_with_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose host does not have them reads their copies."""
    noised = tmp_path / "noised"
    noised.mkdir()
    (noised / "file").write_text("content")
    monkeypatch.setattr(sampling, "copies_of", lambda paths: {path: FolderCopy.read(path) for path in paths})
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    job = with_copies(_job(draw=ClassifierGuidance(noised_classifier=(str(noised),), exponents=(1.0,))))
    shutil.rmtree(noised)
    found: Any = drawing_of(pickle.loads(pickle.dumps(job)))
    (place,) = found.noised_classifier
    assert place != str(noised) and (Path(place) / "file").read_text() == "content"
    assert drawing_of(with_copies(_job())) is rollout


@pytest.mark.full
def test_pre_trained_paths_can_be_scored_by_the_policy(tiny_pipeline: Path, tmp_path: Path) -> None:
    """The job travels; the paths are those of the pre-trained model, the log-ratio is the policy's."""
    sampler = SamplerConfig(num_steps=2)
    _export(tiny_pipeline, tmp_path / "adapter", sampler)
    save_classifier(tmp_path / "size", "size", CONTROLS["size"])
    job = SamplingJob(
        adapter=str(tmp_path / "adapter"),
        base_model=str(tiny_pipeline),
        revision=None,
        controls={"size": CONTROLS["size"]},
        sampler=sampler,
        prompts=("a cross",),
        sample_ids=(0, 1),
        seed=0,
        batch_size=2,
        reference=True,
    )
    scored = dataclasses.replace(job, with_kl=False, draw=functools.partial(rollout, with_log_ratio=True))
    rewards = RewardModelSpec(base_model=str(tiny_pipeline), classifiers={"size": str(tmp_path / "size")})
    plain, found = (_sample_part(pickle.loads(pickle.dumps(part)), rewards, "cpu") for part in (job, scored))
    assert np.array_equal(plain.images, found.images)
    assert plain.log_ratio is not None and not plain.log_ratio.any()
    assert found.log_ratio is not None and np.all(found.log_ratio < -1)  # the policy would hardly have drawn them
    bent = dataclasses.replace(
        job, reference=False, with_kl=False, with_images=False, variance_cost_at=0.5, adapter_scale=0.1
    )
    in_ones = dataclasses.replace(bent, gradient_checkpointing=True, batch_size=1)
    together, alone = (_sample_part(part, rewards, "cpu").variance_cost for part in (bent, in_ones))
    assert together is not None and alone == pytest.approx(together, rel=0.02)  # of terms that cancel


def test_the_tilt_of_a_batch_is_that_of_its_labels() -> None:
    """Σ_c γ_c / β log p_c of the class asked for; a null label adds nothing."""
    batch = Batch((0, 1), ("a", "b"), torch.tensor([[1, 0], [0, 2]]), torch.tensor([[2.0, 3.0], [2.0, 0.0]]))
    log_probs = {
        "size": torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]),
        "colour": torch.tensor([[-5.0, -6.0], [-7.0, -8.0]]),
    }
    rewards = SimpleNamespace(class_log_probs=lambda latents, prompts: log_probs)
    tilts = _log_tilt({"size": 4.0, "colour": 6.0}, batch, rewards)(torch.zeros(2, 1))
    assert tilts.tolist() == [4 * -2 + 6 * -5, 4 * -3]
