"""Updates and evaluations where the worker's tensors are on a device: none meets a tensor of the CPU (see
`tests.pretend_device`), and the numbers are those of the CPU."""

from __future__ import annotations

import dataclasses
import os
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl_ray.config import EstimatorConfig, ScalingConfig, TrainConfig
from ctrl_ray.distributed import engine
from ctrl_ray.distributed import worker as worker_module
from ctrl_ray.distributed.batches import evaluation_batch
from ctrl_ray.distributed.clock import PhaseClock
from ctrl_ray.distributed.evaluate import evaluate_policy
from ctrl_ray.distributed.method import make_method
from ctrl_ray.gradients.rollout import keyed_noise, rollout
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.rewards.model import RewardModel
from ctrl_ray.rewards.protocol import RewardAnswer
from tests.configs import tiny_run
from tests.learners import learner_on, small_config
from tests.pretend_device import pretend_device, waits

pytestmark = pytest.mark.full

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    return small_config(tiny_pipeline, tmp_path_factory.mktemp("one_device") / "classifier")


@pytest.fixture(autouse=True)
def _nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of two whose other rank adds nothing, and which reduces tensors of one kind of device alone."""

    def all_reduce(tensor: Tensor) -> None:
        assert tensor.device.type == _nccl_device.type, f"no backend of the group serves {tensor.device.type} tensors"

    monkeypatch.setattr(engine.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(engine.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(engine.dist, "all_reduce", all_reduce)


_nccl_device = CPU


def _on(config: TrainConfig, *, pool: bool, pretend: bool) -> list[dict[str, float]]:
    """An update, then an evaluation."""
    global _nccl_device
    with pretend_device() if pretend else nullcontext(CPU) as device:
        _nccl_device = device
        learner = learner_on(config, device, pool=pool)
        rows: list[dict[str, Any]] = [
            make_method(learner.config).update(learner, 0),
            evaluate_policy(learner, config.evaluation.num_samples),
        ]
    return [{name: value for name, value in row.items() if not name.endswith("_s")} for row in rows]


@pytest.mark.parametrize(
    ("estimator", "pool"),
    [("full", True), ("full", False), ("sticking_the_landing", True), ("adjoint_matching", True), ("reinforce", True)],
)
def test_nothing_mixes_devices_and_the_numbers_are_those_of_the_cpu(
    config: TrainConfig, estimator: str, pool: bool
) -> None:
    """Rollouts, rewards, adjoint pass, sums over ranks, evaluation."""
    estimators: dict[str, Any] = {"estimator": EstimatorConfig(name=estimator), "group_size": 3}  # type: ignore[arg-type]
    config = dataclasses.replace(config, **estimators)
    for there, here in zip(_on(config, pool=pool, pretend=True), _on(config, pool=pool, pretend=False), strict=True):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-6)


def test_labelled_images_are_encoded_and_noised_on_the_device(config: TrainConfig, tiny_pipeline: Path) -> None:
    """CFG fine-tuning: the VAE, the loss and its sum over ranks, then an evaluation with a scale of the label."""
    control = dataclasses.replace(
        config.controls["jpeg_size"], thresholds=tiny_run(tiny_pipeline).controls["jpeg_size"].thresholds
    )
    config = dataclasses.replace(
        config,
        training_method="cfg",
        data="shapes",
        num_drawn_images=40,
        controls={"jpeg_size": control},
        sampler=dataclasses.replace(config.sampler, control_scale=3.0),
    )
    for there, here in zip(_on(config, pool=True, pretend=True), _on(config, pool=True, pretend=False), strict=True):
        assert there == pytest.approx(here, rel=1e-4, abs=1e-6)


def test_rollout_steps_do_not_wait_for_the_device(config: TrainConfig) -> None:
    """Neither copies nor values that the host looks at, with guidance and KL, from the second rollout on."""
    with pretend_device() as device:
        learner = learner_on(config, device, pool=False)
        batch = evaluation_batch(range(2), learner.prompts, learner.controls, ("jpeg_size",))
        inputs = Inputs(learner.encoder.encode(batch.prompts), batch.labels.to(device), learner.guidance)
        noise = keyed_noise(0, 0, batch.sample_ids, learner.engine.latent_shape, learner.kernel.num_steps, device)
        rollout(learner.engine, learner.kernel, inputs, noise, with_kl=True)
        with waits() as found:
            trajectory = rollout(learner.engine, learner.kernel, inputs, noise, with_kl=True)
            assert found == []
            trajectory.clean_latents.cpu()
            assert found == ["aten::_to_copy"]


def test_an_evaluation_asks_for_no_gradient(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities come in chunks, without the backward that a request for a cotangent takes."""
    learner = learner_on(config, CPU, pool=False)
    believed = evaluate_policy(learner, 5)["log_prob/jpeg_size"]
    with monkeypatch.context() as patch:
        patch.setattr(RewardModel, "evaluate", lambda *_: pytest.fail("a gradient was asked for"))
        assert evaluate_policy(learner, 5)["log_prob/jpeg_size"] == believed
    samples = learner.roll_out(
        evaluation_batch(range(3), learner.prompts, learner.controls, ("jpeg_size",)), 1_000_003, 0
    )
    more = learner.roll_out(evaluation_batch((3, 4), learner.prompts, learner.controls, ("jpeg_size",)), 1_000_003, 0)
    by_request = 0.0
    for part, ids in ((samples, range(3)), (more, (3, 4))):
        batch = evaluation_batch(ids, learner.prompts, learner.controls, ("jpeg_size",))
        by_request += float(learner.submit(batch, part.clean_latents).result().log_probs.sum())
    assert believed == pytest.approx(by_request / 5, rel=1e-6)


def test_local_scoring_is_no_part_of_the_rollout(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what the worker waits for."""
    evaluate = RewardModel.evaluate

    def slow(*arguments: Any) -> RewardAnswer:
        time.sleep(0.5)
        return evaluate(*arguments)

    monkeypatch.setattr(RewardModel, "evaluate", slow)
    learner = learner_on(config, CPU, pool=False)
    row = make_method(config).update(learner, 0)
    assert row["reward_wait_s"] > 1.0 and row["rollout_s"] < row["update_s"] - 1.0


def test_seconds_on_a_gpu_are_those_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marks are events; the host's clock, which is ahead, counts for nothing."""
    now_ms = iter((0.0, 10.0, 30.0, 40.0, 45.0, 100.0))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at_ms, self.waited = next(now_ms), False

        def synchronize(self) -> None:
            self.waited = True

        def elapsed_time(self, end: Event) -> float:
            assert end.waited
            return end.at_ms - self.at_ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(record_event=lambda event: event))
    clock = PhaseClock(torch.device("cuda"))
    for phase in ("rollout_s", "backward_s"):
        with clock(phase):
            pass
    found = clock.seconds()
    assert found == pytest.approx({"update_s": 0.1, "rollout_s": 0.02, "backward_s": 0.005})


def test_a_workers_process_is_set_to_its_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for DeepSpeed, which takes LOCAL_RANK for it."""
    chosen: list[torch.device] = []
    context = SimpleNamespace(get_world_rank=lambda: 5, get_world_size=lambda: 8)
    monkeypatch.setattr(worker_module.ray.train, "get_context", lambda: context)
    monkeypatch.setattr(worker_module.ray.train.torch, "get_device", lambda: torch.device("cuda:3"))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "0")
    rank = worker_module.set_up_process(TrainConfig(controls={}, scaling=ScalingConfig(use_gpu=True)))
    assert (rank.index, rank.size, rank.device) == (5, 8, torch.device("cuda:3"))
    assert chosen == [torch.device("cuda:3")] and os.environ["LOCAL_RANK"] == "3"
