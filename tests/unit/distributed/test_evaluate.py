"""The certificate of an evaluation during training: from the paths of all ranks, whoever drew them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed import evaluate
from ctrl_ray.distributed.evaluate import evaluate_policy
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.evaluation.certificate import certificate_row, certify_labels
from ctrl_ray.policy.controlled import ControlledPolicy
from tests.learners import learner_on, small_config

COUNT = 8


@pytest.fixture(scope="module")
def config(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return small_config(tiny_pipeline, tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def learner(config: TrainConfig) -> Learner:
    """Of a policy that has left the pre-trained model."""
    learner = learner_on(config, torch.device("cpu"), pool=False)
    policy = learner.engine.policy
    assert isinstance(policy, ControlledPolicy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    beliefs = np.log(np.random.default_rng(0).dirichlet(np.ones(4), size=32))
    return dataclasses.replace(learner, pre_trained_log_probs={"jpeg_size": beliefs})


def test_it_is_the_certificate_of_the_samples(config: TrainConfig, learner: Learner) -> None:
    metrics = evaluate_policy(learner, COUNT)
    batch = learner.evaluation_batch(range(COUNT))
    trajectory = learner.roll_out(batch, config.evaluation.seed, 0, with_kl=True)
    believed = learner.rewards.class_log_probs(trajectory.clean_latents, batch.prompts)["jpeg_size"]
    assert trajectory.log_ratio is not None and trajectory.kl_per_step is not None
    expected = certificate_row(
        certify_labels(
            trajectory.log_ratio.numpy(),
            batch.labels.numpy(),
            believed.gather(1, batch.labels).double().numpy(),
            config.controls,
            config.kl_coef,
            learner.pre_trained_log_probs,
        )
    )
    assert expected["gap"] != 0 and "gap/jpeg_size/" + config.controls["jpeg_size"].class_names[3] in expected
    # weights of other batches, in float32
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert (
        metrics["kl"] == pytest.approx(float(trajectory.kl_per_step.sum(1).mean()), rel=1e-3) and metrics["kl"] > 0.01
    )


def test_ranks_share_the_paths(learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two ranks give to the sums adds up to what one rank alone has. Classes are the prompts' here: a JPEG size turns
    with a pixel's rounding, which another batch has in another way."""
    tables: list[Tensor] = []
    monkeypatch.setattr(
        "ctrl_ray.evaluation.judging.load_oracle", lambda name: lambda image, prompt: 1e9 if "red" in prompt else 0.0
    )

    def all_reduce_sum(values: Tensor, device: torch.device) -> Tensor:
        tables.append(values.clone())
        return values

    monkeypatch.setattr(evaluate, "all_reduce_sum", all_reduce_sum)
    evaluate_policy(learner, COUNT)
    whole = tables[:2]
    for index in range(2):
        evaluate_policy(dataclasses.replace(learner, rank=Rank(index, 2, torch.device("cpu"))), COUNT)
    for together, first, second in zip(whole, tables[2:4], tables[4:6], strict=True):
        torch.testing.assert_close(first + second, together, rtol=1e-3, atol=1e-3)
        assert first.any() and second.any()


def test_without_log_z_there_is_none(learner: Learner) -> None:
    assert "gap" not in evaluate_policy(dataclasses.replace(learner, pre_trained_log_probs={}), 2)


def test_an_oracle_is_told_the_prompts(config: TrainConfig, learner: Learner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each image the one that it was drawn for. To this oracle every image is of class 0."""
    batch = learner.evaluation_batch(range(COUNT))
    told: list[str] = []
    monkeypatch.setattr(
        "ctrl_ray.evaluation.judging.load_oracle", lambda name: lambda image, prompt: told.append(prompt) or 0.0
    )
    metrics = evaluate_policy(learner, COUNT)
    assert told == list(batch.prompts)
    assert metrics["accuracy/jpeg_size"] == pytest.approx(float((batch.labels[:, 0] == 0).double().mean()))
