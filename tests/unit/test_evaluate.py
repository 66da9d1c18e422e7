"""Judging an adapter later: with what its run fitted to its machines."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctrl_ray import evaluate
from ctrl_ray.config import (
    ControlConfig,
    EvaluationConfig,
    LoraConfig,
    MethodConfig,
    RewardPoolConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.distributed import worker
from ctrl_ray.distributed.batches import evaluation_batch
from ctrl_ray.distributed.sampling import load_policy
from ctrl_ray.distributed.worker import TrainJob
from ctrl_ray.driver import before_after
from ctrl_ray.driver.before_after import BeforeAndAfter, Subject, check_pictures, sample_before_and_after
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.evaluate import evaluate_adapter
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.planning.preflight import _adapter_info
from ctrl_ray.policy.adapter import make_adapter_info, save_adapter
from tests.policies import make_policy, save_gains_adapter

CONTROLS = {"jpeg_size": ControlConfig(oracle="jpeg_size", thresholds=(1000.0,), unit="bytes")}


def _write_adapter(folder: Path, pipeline: Path, training: dict[str, Any]) -> None:
    """One that has learned nothing, and says which run made it."""
    lora = LoraConfig(rank=2)
    info = make_adapter_info(
        base_model=str(pipeline),
        base_revision=None,
        controls=CONTROLS,
        sampler=SamplerConfig(num_steps=2),
        lora=lora,
        training=training,
    )
    save_adapter(folder, make_policy(pipeline, info.num_classes, lora=lora), info)


@pytest.mark.parametrize(
    ("training", "batch_size", "expected"),
    [
        ({"precision": "bf16", "evaluation_batch_size": 16, "decode_chunk_size": 2}, None, ("bf16", 16, 2)),
        ({"precision": "bf16", "evaluation_batch_size": 16, "decode_chunk_size": 2}, 4, ("bf16", 4, 2)),
        ({}, None, ("fp32", 128, 32)),
    ],
    ids=["the run's", "another batch size", "an adapter that does not say"],
)
def test_precision_and_sizes_are_those_of_the_run(
    tiny_pipeline: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    training: dict[str, Any],
    batch_size: int | None,
    expected: tuple[str, int, int],
) -> None:
    """Of a run that fitted a GPU of 24 GB."""
    _write_adapter(tmp_path, tiny_pipeline, training)
    asked: list[tuple[str, int, int]] = []

    def sample_policy(job: Any, rewards: Any, scaling: Any) -> Any:
        assert rewards.precision == job.precision
        asked.append((job.precision, job.batch_size, rewards.decode_chunk_size))

    monkeypatch.setattr(before_after, "connected", nullcontext)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(before_after, "sample_policy", sample_policy)
    subject = Subject.of_adapter(
        tmp_path, prompts=["a cross"], batch_size=batch_size, classifiers={"jpeg_size": str(tmp_path)}
    )
    sample_before_and_after(subject, num_samples=4, counts=EvaluationConfig())
    assert asked == [expected] * 2


def test_an_adapter_says_what_fitted_its_run(tiny_pipeline: Path) -> None:
    """From the config to the checkpoint's adapter.json, with how far the training is."""
    config = TrainConfig(
        base_model=str(tiny_pipeline),
        controls=CONTROLS,
        scaling=ScalingConfig(precision="bf16"),
        evaluation=EvaluationConfig(batch_size=16),
        rewards=RewardPoolConfig(decode_chunk_size=2),
    )
    unused: Any = None
    info = _adapter_info(config, config.controls)
    job = TrainJob(config=config, controls={}, prompts=(), rewards=unused, info=info, channel=unused)
    training = worker._info(job, {"updates_done": 3, "kl_noise_floor": 0.25}).training
    expected = {"precision": "bf16", "evaluation_batch_size": 16, "decode_chunk_size": 2}
    assert training.items() >= {**expected, "updates_done": 3, "kl_noise_floor": 0.25}.items()


@pytest.mark.parametrize(("precision", "floor"), [("bf16", 0.25), ("fp32", None)])
def test_the_runs_floor_is_told_in_the_runs_precision_alone(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, floor: float | None
) -> None:
    _write_adapter(tmp_path, tiny_pipeline, {"precision": "bf16", "kl_noise_floor": 0.25})
    told: list[float | None] = []
    monkeypatch.setattr(before_after, "sample_before_and_after", lambda *_, **__: BeforeAndAfter(*[None] * 3))  # type: ignore
    monkeypatch.setattr(evaluate, "report_on", lambda *_, kl_noise_floor, **__: told.append(kl_noise_floor))
    asked: dict[str, Any] = {"prompts": ["a cross"], "classifiers": {"jpeg_size": str(tmp_path)}}
    evaluate_adapter(tmp_path, tmp_path, precision=precision, **asked)
    assert told == [floor]


def test_some_controls_alone_can_be_asked_for(tiny_pipeline: Path, tmp_path: Path) -> None:
    """The others' labels are null in every sample, in the columns that the policy reads; one that is not there is an error."""
    controls = {**CONTROLS, "hue": ControlConfig(classes=("red", "green", "blue"))}
    save_gains_adapter(tmp_path, tiny_pipeline, controls)
    given: dict[str, Any] = {"prompts": ["a cross"], "classifiers": {"hue": str(tmp_path)}}
    subject = Subject.of_adapter(tmp_path, asked=["hue"], **given)
    assert list(subject.controls) == ["hue"]
    policy, columns, _ = load_policy(dataclasses.replace(subject.job(3, 0), reference=False))
    assert list(columns) == list(policy.controls.names) == ["hue", "jpeg_size"]
    batch = evaluation_batch(range(3), subject.prompts, columns, list(subject.controls))
    assert batch.labels.tolist() == [[0, 2], [1, 2], [2, 2]]
    with pytest.raises(
        ConfigError, match=r"--controls names \['moon'\]; the adapter has the controls \['jpeg_size', 'hue'\]"
    ):
        Subject.of_adapter(tmp_path, asked=["moon"], **given)
    with pytest.raises(ConfigError, match="says what an adapter is asked for"):
        evaluate.EvaluateOptions(base_model="shapes", method=MethodConfig(name="dps"), controls=("hue",))


def _samples(images: np.ndarray) -> EvaluationSamples:
    count = len(images)
    return EvaluationSamples(
        images=images,
        prompts=("a cross",) * count,
        labels=np.zeros((count, 1), np.int64),
        kl=np.zeros(count),
        sample_ids=np.arange(count),
    )


def test_black_pictures_are_not_judged_in_silence(capsys: pytest.CaptureFixture[str]) -> None:
    images = np.full((3, 4, 4, 3), 9, np.uint8)
    check_pictures(_samples(images), "samples")
    assert capsys.readouterr().out == ""
    images[1] = 0
    check_pictures(_samples(images), "samples")
    assert capsys.readouterr().out.startswith("warning: samples: 1 of 3 images are black, every pixel is 0: sample 1. ")
    images[:] = 0
    with pytest.raises(ModelError, match=r"samples: 3 of 3 images are black, .* 0: sample 0, sample 1, sample 2"):
        check_pictures(_samples(images), "samples")


def test_what_is_wrong_is_known_before_anything_is_drawn(
    tiny_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged adapter, sizes that contradict each other, an output that is a file, a judge that is not there."""

    def connected() -> None:
        raise AssertionError("Ray was asked")

    monkeypatch.setattr(before_after, "connected", connected)
    adapter = tmp_path / "adapter"
    _write_adapter(adapter, tiny_pipeline, {"kl_coef": 1.0})
    with pytest.raises(ConfigError, match="max_log_z_samples is 4096; expected at least log_z_samples, 5000"):
        evaluate_adapter(adapter, tmp_path / "report", log_z_samples=5000)
    with pytest.raises(ModelError, match=r"CLIP folder \./nothing does not exist"):
        evaluate_adapter(adapter, tmp_path / "report", clip_model="./nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"{tmp_path / 'file'} is a file, where a folder is meant"):
        evaluate.run(evaluate.EvaluateOptions(adapter=str(adapter), output_dir=str(tmp_path / "file")))
    (adapter / "pytorch_lora_weights.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match=r"adapter/pytorch_lora_weights\.safetensors is no safetensors file"):
        evaluate_adapter(adapter, tmp_path / "report", prompts=["a cross"])
    assert not (tmp_path / "report").exists()
