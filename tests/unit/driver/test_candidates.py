"""What training leaves in the adapter for sampling with candidates."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctrl_ray.candidates.weights import SHARES
from ctrl_ray.config import ControlConfig, SamplerConfig, TrainConfig
from ctrl_ray.config.presets import preset
from ctrl_ray.distributed.sampling import SamplingJob
from ctrl_ray.driver import candidates
from ctrl_ray.driver.candidates import MOST_SCORED, candidate_share, carry_classifiers, store_candidate_share
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.policy.adapter import AdapterInfo, read_adapter_info
from ctrl_ray.rewards.spec import RewardModelSpec
from ctrl_ray.runs.finished import find_classifiers, run_classifiers
from tests.classifiers import save_classifier

SIZE = ControlConfig(classes=("small", "large"), guidance_strength=2.0)


def _samples(x: np.ndarray, *, push: float, known: bool = True) -> EvaluationSamples:
    """Of a one-dimensional model N(0, 1); the policy of class 1 is N(push, 1), that of class 0 its mirror image."""
    labels = np.arange(len(x)) % 2
    signs = 2 * labels - 1
    return EvaluationSamples(
        images=np.zeros((len(x), 2, 2, 3), dtype=np.uint8),
        prompts=("a",) * len(x),
        labels=labels[:, None],
        kl=np.zeros(len(x)),
        class_log_probs={"size": -np.logaddexp(0, np.stack([x, -x], axis=1))},
        sample_ids=np.arange(len(x)),
        log_ratio=push * signs * x - push**2 / 2 if known else None,
    )


def _all(push: float) -> tuple[EvaluationSamples, ...]:
    """Before, after, and pre-trained paths with their log-ratios."""
    rng, count = np.random.default_rng(0), 4000
    signs = 2 * (np.arange(count) % 2) - 1
    x = rng.normal(size=(3, count))
    return (
        _samples(x[0], push=0, known=False),
        _samples(x[1] + push * signs, push=push),
        _samples(x[2], push=push),
    )


def test_a_better_policy_draws_more_of_its_candidates_itself() -> None:
    near, far = (candidate_share(*_all(push), {"size": 1.0}) for push in (0.5, 4.0))
    assert near.share <= 1 / 8 and near.efficiency > 0.9
    assert far.share == max(SHARES) and far.efficiency < near.efficiency


def _info() -> AdapterInfo:
    return AdapterInfo(
        base_model="shapes",
        base_revision=None,
        base_sha256="",
        controls={"size": SIZE},
        sampler=SamplerConfig(),
        scheduler={},
        lora=None,
        training={"kl_coef": 2.0},
    )


def test_the_share_is_written_into_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From at most MOST_SCORED pre-trained paths; a KL that is a mean has no weights."""
    (tmp_path / "adapter.json").write_text(_info().to_json())
    before, after, scored = _all(0.5)
    jobs: list[SamplingJob] = []

    def sampled(job: SamplingJob, *_: Any) -> EvaluationSamples:
        jobs.append(job)
        return scored

    monkeypatch.setattr(candidates, "sample_policy", sampled)
    config = dataclasses.replace(preset("shapes"), controls={"size": SIZE}, kl_coef=2.0)
    job = SamplingJob(
        adapter=None,
        base_model="shapes",
        revision=None,
        controls=config.controls,
        sampler=config.sampler,
        prompts=("a",),
        sample_ids=tuple(range(1000)),
        seed=0,
        batch_size=8,
        reference=False,
    )
    rewards = RewardModelSpec(base_model="shapes", classifiers={})

    def stored(config: TrainConfig, after: EvaluationSamples) -> Any:
        return store_candidate_share(config, tmp_path, job, rewards, before, after)

    share, efficiency = candidate_share(before, after, scored, {"size": 1.0})
    assert stored(config, after) == (share, efficiency)
    (job_of_scored,) = jobs
    assert job_of_scored.reference and job_of_scored.adapter == str(tmp_path)
    assert job_of_scored.sample_ids == tuple(range(MOST_SCORED))
    training = read_adapter_info(tmp_path).training
    assert training == {"kl_coef": 2.0, "candidate_share": share, "candidate_efficiency": efficiency}
    assert stored(dataclasses.replace(config, latent_reduction="mean"), after) is None
    assert stored(config, before) is None and len(jobs) == 1


def test_classifiers_travel_with_the_adapter(tmp_path: Path) -> None:
    """What a classifier is loaded from, and no picture; the copy is found where the run is not."""
    save_classifier(tmp_path / "fitted", "size", SIZE)
    (tmp_path / "fitted" / "reliability.png").write_bytes(b"")
    control = dataclasses.replace(SIZE, classifier=str(tmp_path / "fitted"))
    adapter = tmp_path / "run" / "adapter"
    carry_classifiers(dataclasses.replace(preset("shapes"), controls={"size": control}), adapter)
    own = adapter / "classifier" / "size"
    assert sorted(file.name for file in own.iterdir()) == ["classifier.json", "model.safetensors"]
    assert json.loads((own / "classifier.json").read_text())["classes"] == ["small", "large"]
    assert run_classifiers(adapter, ["size"], {}) == {"size": str(own.resolve())}
    assert find_classifiers(adapter, ["size", "hue"], {"size": tmp_path}) == {"size": tmp_path.resolve()}
    (adapter / "adapter.json").write_text(_info().to_json())
    hue = dataclasses.replace(SIZE, classifier=str(tmp_path / "fitted"))
    continued = dataclasses.replace(preset("shapes"), controls={"hue": hue}, init_adapter=str(adapter))
    carry_classifiers(continued, tmp_path / "continued")
    assert sorted(folder.name for folder in (tmp_path / "continued" / "classifier").iterdir()) == ["hue", "size"]
    beside = tmp_path / "run" / "classifier" / "hue"
    beside.mkdir(parents=True)
    assert find_classifiers(adapter, ["size", "hue"], {}) == {"size": own.resolve(), "hue": beside.resolve()}
