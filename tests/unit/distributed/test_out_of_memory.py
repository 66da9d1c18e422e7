"""A GPU's memory that does not suffice: every process of a run says what it did, and no restart is tried."""

from __future__ import annotations

import dataclasses
import importlib
import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from ray.train import Checkpoint
from torch import Tensor

from ctrl_ray import errors
from ctrl_ray.config import SamplerConfig, TrainConfig
from ctrl_ray.distributed import sampling, validation, worker
from ctrl_ray.distributed.checkpoints import PROGRESS_FILE
from ctrl_ray.distributed.learner import Learner
from ctrl_ray.distributed.rows import Stop
from ctrl_ray.distributed.worker import TrainJob, train_worker
from ctrl_ray.driver import remedies, stages
from ctrl_ray.errors import HOPELESS, GpuMemoryError, RewardError, naming_memory
from ctrl_ray.exact.problems import Sampler
from ctrl_ray.exact.suite import Effort, gaussian
from ctrl_ray.planning import planner
from ctrl_ray.rewards import model
from ctrl_ray.rewards.actor import RewardActor
from ctrl_ray.runs.folder import RunFolder
from tests.analytic import PlainEngine, make_learner

TORCH_SAYS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22.05 GiB of which 1.03 GiB is free. "
    "Including non-PyTorch memory, this process has 21.00 GiB memory in use.\nSee documentation."
)
AMOUNTS = "torch tried to allocate 2.00 GiB on a card of 22.05 GiB, of which 1.03 GiB was free"


class _FullInBackward(PlainEngine):
    def backward(self, loss: Tensor) -> None:
        raise torch.OutOfMemoryError(TORCH_SAYS)


class _FullInForward(PlainEngine):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError(TORCH_SAYS)


class _Channel:
    """A MetricsChannel in this process: `method.remote(...)` calls it at once."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []
        self.stops: list[Stop] = []
        self.failure = SimpleNamespace(remote=lambda: None)
        self.fail = SimpleNamespace(remote=self.failures.append)
        self.request_stop = SimpleNamespace(remote=self.stops.append)
        self.put = SimpleNamespace(remote=lambda row: None)


def _full(*args: Any, **kwargs: Any) -> Any:
    raise torch.OutOfMemoryError(TORCH_SAYS)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> _Channel:
    """Calls of actors return their value in this process."""
    for module in (worker, validation):
        monkeypatch.setattr(module.ray, "get", lambda value: value)
    return _Channel()


def _learner(engine: type[PlainEngine], every_updates: int = 0) -> Learner:
    case = dataclasses.replace(gaussian(), effort=Effort(batch_size=4, num_nodes=5))
    case = dataclasses.replace(case, problem=dataclasses.replace(case.problem, sampler=Sampler(num_steps=3)))
    learner, _ = make_learner(case, engine=engine)
    evaluation = dataclasses.replace(learner.config.evaluation, every_updates=every_updates, num_samples=4)
    return dataclasses.replace(learner, config=dataclasses.replace(learner.config, evaluation=evaluation))


def _job(config: TrainConfig, channel: _Channel) -> TrainJob:
    unused: Any = None
    return TrainJob(config=config, controls={}, prompts=(), rewards=unused, info=unused, channel=channel)


@pytest.mark.parametrize(
    ("engine", "updates_done", "where"),
    [
        (_FullInBackward, 3, "update 3, in the adjoint pass"),
        (_FullInForward, 3, "update 3, in a rollout"),
        (_FullInForward, 0, "the evaluation after update 0, in a rollout"),
        (None, 0, "before the first update"),
    ],
)
def test_a_worker_says_what_it_did_and_is_not_restarted(
    here: _Channel,
    monkeypatch: pytest.MonkeyPatch,
    engine: type[PlainEngine] | None,
    updates_done: int,
    where: str,
) -> None:
    learner = _learner(engine or PlainEngine, every_updates=10)
    built = (learner, {"updates_done": updates_done})
    monkeypatch.setattr(worker, "set_up_process", lambda config: learner.rank)
    monkeypatch.setattr(worker, "_build_learner", _full if engine is None else lambda job, rank: built)
    with pytest.raises(GpuMemoryError) as caught:
        train_worker(_job(learner.config, here))
    assert str(caught.value) == f"out of GPU memory: {where}: {AMOUNTS}"
    assert here.failures == [caught.value]  # restarted workers return at once
    assert isinstance(caught.value, HOPELESS)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_asynchronous_evaluation_ends_the_run(
    here: _Channel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    learner = _learner(_FullInForward)
    (tmp_path / PROGRESS_FILE).write_text(json.dumps({"updates_done": 20}))
    monkeypatch.setattr(validation, "_learner", lambda job, folder: learner)
    with pytest.raises(GpuMemoryError, match="the asynchronous evaluation after update 20, in a rollout: torch tried"):
        validation.validate_checkpoint(Checkpoint.from_directory(str(tmp_path)), job=_job(learner.config, here))
    assert len(here.failures) == 1 and [stop.kind for stop in here.stops] == ["failed"]


def test_a_sampling_task_says_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "load_policy", _full)
    unused: Any = None
    with pytest.raises(GpuMemoryError, match=r"sampling for an evaluation: torch tried to allocate 2\.00 GiB"):
        sampling._sample_part(_sampling_job(), unused, "cpu")


def _sampling_job() -> sampling.SamplingJob:
    return sampling.SamplingJob(
        adapter=None,
        base_model="shapes",
        revision=None,
        controls={},
        sampler=SamplerConfig(),
        prompts=("",),
        sample_ids=(0,),
        seed=0,
        batch_size=1,
        reference=False,
    )


def test_a_reward_actor_says_what_it_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a RewardError, with which the workers would be restarted."""
    actor = RewardActor.__new__(RewardActor)
    full: Any = SimpleNamespace(evaluate=_full)
    spec: Any = SimpleNamespace(decode_chunk_size=2)
    actor._model, actor._spec = full, spec
    request = (np.zeros((8, 4, 4, 4), np.float32), ("",) * 8, np.zeros((8, 1), np.int64), np.ones((8, 1), np.float32))
    with pytest.raises(GpuMemoryError, match="a reward actor answers evaluate for 8 samples, 2 at a time: torch tried"):
        actor.answer("evaluate", request)
    monkeypatch.setattr(model, "load_reward_model", _full)
    actor._model = None
    with pytest.raises(GpuMemoryError, match="a reward actor loads its model: torch tried"):
        actor.load()


def test_only_a_lack_of_gpu_memory_is_renamed() -> None:
    for error in (RuntimeError("shapes differ"), RewardError("if actors run out of memory on CUDA, lower it")):
        with pytest.raises(type(error)) as caught, naming_memory("update 1"):
            raise error
        assert caught.value is error
    with pytest.raises(GpuMemoryError, match=r"update 1: CUDA error: out of memory$"), naming_memory("update 1"):
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
    with pytest.raises(GpuMemoryError, match=r"update 1: nothing more is known$"), naming_memory("update 1"):
        raise torch.OutOfMemoryError


def test_the_phases_are_functions_that_exist() -> None:
    for module, name in errors._PHASES:
        found = importlib.import_module(module)
        assert hasattr(found, name) or any(hasattr(value, name) for value in vars(found).values()), (module, name)


def test_the_driver_adds_what_the_planner_would_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remedies, "memory_advice", lambda config, controls: f"lower {config} of {controls}")
    checked: Any = SimpleNamespace(config="it", controls="all")
    behind = RuntimeError("ray")
    behind.__cause__ = GpuMemoryError("out of GPU memory: update 1")
    with (
        pytest.raises(GpuMemoryError, match=r"^out of GPU memory: update 1\. lower it of all$"),
        remedies.with_remedies(checked),
    ):
        raise behind
    with pytest.raises(RewardError, match="other"), remedies.with_remedies(checked):
        raise RewardError("other")


def test_training_and_the_samples_around_it_get_the_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise GpuMemoryError("out of GPU memory: here")

    log, unused = SimpleNamespace(close=lambda: None), None
    for name, stand_in in {
        "RunLog": lambda *_, **__: log,
        "train_job": lambda *_: unused,
        "run_training": full,
        "reference_job": lambda checked: _sampling_job(),
        "sample_policy": full,
    }.items():
        monkeypatch.setattr(stages, name, stand_in)
    monkeypatch.setattr(remedies, "memory_advice", lambda config, controls: "lower it")
    checked: Any = SimpleNamespace(config=TrainConfig(), controls={})
    trained: Any = SimpleNamespace(updates_done=1, kl_noise_floor=None)
    folder, rewards = RunFolder(str(tmp_path)), cast(Any, None)
    with pytest.raises(GpuMemoryError, match=r"here\. lower it$"):
        stages.fine_tune(checked, folder, rewards, resume=False)
    with pytest.raises(GpuMemoryError, match=r"here\. lower it$"):
        stages.evaluate_and_report(checked, folder, rewards, trained, {})


@pytest.mark.parametrize(
    ("fixes", "advice"),
    [
        (["this: 3 GiB (fits)", "that: 4 GiB"], "30 of 24 GiB; lower it by one of: this: 3 GiB (fits); that: 4 GiB"),
        ([], "30 of 24 GiB, and knows no single setting that lowers it; take larger cards"),
    ],
)
def test_the_advice_is_what_lowers_the_count(monkeypatch: pytest.MonkeyPatch, fixes: list[str], advice: str) -> None:
    for name, value in {
        "Planner": SimpleNamespace(plan=lambda config: None),
        "cluster_facts": None,
        "memory_fit": SimpleNamespace(reason="30 of 24 GiB"),
        "remedies": fixes,
    }.items():
        monkeypatch.setattr(planner, name, lambda *_, value=value, **__: value)
    assert planner.memory_advice(TrainConfig(), {}) == f"The planner counts {advice}"
