"""The pool against the same model in this process, and what it does when an actor is lost, late or wrong."""

from __future__ import annotations

import gc
import math
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch
from torch import Tensor

from ctrl_ray.config import RewardPoolConfig
from ctrl_ray.errors import ConfigError, ModelError, ResourceError, RewardError
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.model import RewardModel, RewardModelSpec
from ctrl_ray.rewards.pool import RewardPool, start_reward_pool
from ctrl_ray.rewards.protocol import Rewarded
from tests.unit.rewards.small import request, small_model

pytestmark = pytest.mark.integration

SPEC = RewardModelSpec(base_model="unused: the model is given", classifiers={})


@pytest.fixture(scope="module")
def model(tiny_pipeline: Path) -> RewardModel:
    return small_model(tiny_pipeline)


@pytest.fixture(scope="module")
def pool(ray_session: None, model: RewardModel) -> Iterator[RewardPool]:
    config = RewardPoolConfig(num_actors=2, cpus_per_actor=0.5, timeout_s=600)
    with start_reward_pool(SPEC, config, model=model, placement_timeout_s=600) as pool:
        yield pool


def assert_agree(answer: Rewarded, expected: Rewarded) -> None:
    """The bars of the project: log-probabilities to 1e-5 absolute, cotangents to 1e-4 relative L2."""
    assert answer.cotangent is not None and expected.cotangent is not None
    assert float((answer.log_probs - expected.log_probs).abs().max()) <= 1e-5
    assert float((answer.cotangent - expected.cotangent).norm() / expected.cotangent.norm()) <= 1e-4


def test_pool_agrees_with_local(pool: RewardPool, model: RewardModel) -> None:
    pooled, local = pool.client(), LocalRewards(model)
    assert pooled.controls == local.controls == {"jpeg_size": 4, "colourfulness": 3}
    requests = [request(batch, seed) for seed, batch in enumerate((1, 7, 40, 33))]
    pending = [pooled.submit(*arguments) for arguments in requests]
    for wait, arguments in reversed(list(zip(pending, requests, strict=True))):
        answer = wait.result()
        assert_agree(answer, local.submit(*arguments).result())
        assert wait.result() is answer
    latents, prompts = requests[2][:2]
    assert torch.equal(pooled.decode(latents), local.decode(latents))
    for name, values in pooled.class_log_probs(latents, prompts).items():
        torch.testing.assert_close(values, local.class_log_probs(latents, prompts)[name], atol=1e-5, rtol=0)


def test_answers_repeat_bitwise_whoever_asks_and_answers(pool: RewardPool) -> None:
    arguments = request(9, seed=5)
    clients: list[PooledRewards] = [pickle.loads(pickle.dumps(pool.client())), pool.client().for_worker(1)]
    answers = [client.submit(*arguments).result() for client in clients for _ in range(2)]
    for answer in answers[1:]:
        assert torch.equal(answer.log_probs, answers[0].log_probs)
        assert answer.cotangent is not None and answers[0].cotangent is not None
        assert torch.equal(answer.cotangent, answers[0].cotangent)


def test_a_worker_process_asks(pool: RewardPool, model: RewardModel) -> None:
    @ray.remote(num_cpus=0.1)
    def work(rewards: PooledRewards) -> tuple[Tensor, Tensor | None]:
        return tuple(rewards.submit(*request(5)).result())  # type: ignore[return-value]

    assert_agree(Rewarded(*ray.get(work.remote(pool.client()))), model.evaluate(*request(5)))


def test_requests_are_spread_and_bounded(pool: RewardPool) -> None:
    client = PooledRewards(pool.actors, pool.controls, timeout_s=60, chunk_size=32, max_outstanding=3)
    pending = [client.submit(*request(200, seed)) for seed in range(3)]
    assert sorted(wait._call.actor_index for wait in pending) == [0, 0, 1]
    most = 0
    for seed in range(3, 8):
        pending.append(client.submit(*request(200, seed)))
        most = max(most, len(client._unfinished()))
    assert most <= 3
    assert len({wait.result().log_probs.sum().item() for wait in pending}) == 8
    first = pool.client().for_worker(3)
    assert first.submit(*request(1))._call.actor_index == 1


def test_errors_of_the_evaluation_come_through(pool: RewardPool) -> None:
    client = pool.client()
    latents, prompts, labels, weights = request(6)
    poisoned = latents.clone()
    poisoned[3] = math.nan
    with pytest.raises(RewardError, match=r"^latents are not finite for 1 of 6 samples \(positions 3 of"):
        client.submit(poisoned, prompts, labels, weights).result()
    with pytest.raises(ConfigError, match=r"^label 13 of control 'jpeg_size' is out of range"):
        client.submit(latents, prompts, labels + 9, weights).result()
    with pytest.raises(RewardError, match=r"^reward actor 0 failed: "):
        client._call("decode", ("no array",)).result(None)
    assert client.submit(latents, prompts, labels, weights).result().log_probs.shape == (6, 2)


def test_a_late_answer_is_an_error(pool: RewardPool) -> None:
    client = pool.client()
    pending = client.submit(*request(400))
    with pytest.raises(RewardError, match=r"reward actor 0 of 2 gave no answer within 0\.01 s .*rewards\.timeout_s"):
        pending.result(timeout_s=0.01)
    assert pending.result().log_probs.shape == (400, 2)  # only that wait was too short


def test_a_killed_actors_requests_are_answered_by_others(pool: RewardPool, model: RewardModel) -> None:
    client = pool.client()
    pid = ray.get(pool.actors[0].process_id.remote())
    requests = [request(300, seed) for seed in range(4)]
    pending = [client.submit(*arguments) for arguments in requests]
    assert [wait._call.actor_index for wait in pending] == [0, 1, 0, 1]
    os.kill(pid, signal.SIGKILL)
    for wait, arguments in zip(pending, requests, strict=True):
        assert_agree(wait.result(), model.evaluate(*arguments))
    assert pending[2]._call.actor_index == 1
    deadline = time.monotonic() + 60  # Ray has started it again
    while True:
        try:
            assert ray.get(pool.actors[0].process_id.remote()) != pid
            break
        except ray.exceptions.ActorUnavailableError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_nothing_stays_in_the_object_store(pool: RewardPool) -> None:
    total = ray.cluster_resources()["object_store_memory"]

    def used() -> float:
        gc.collect()
        return total - ray.available_resources()["object_store_memory"]

    def reaches(at_least: float, at_most: float) -> bool:
        deadline = time.monotonic() + 60  # Ray's view of its resources lags
        while not at_least <= used() <= at_most and time.monotonic() < deadline:
            time.sleep(0.2)
        return at_least <= used() <= at_most

    def settled() -> float:
        """What is there for good (the model that the pool was given), once earlier tests' answers are gone."""
        values = [used()]
        deadline = time.monotonic() + 60
        while (len(values) < 10 or len(set(values[-10:])) > 1) and time.monotonic() < deadline:
            time.sleep(0.2)
            values.append(used())
        return values[-1]

    before = settled()
    client = pool.client()
    held = client.submit(*request(2000))  # 0.5 MB of latents there and of cotangents back
    assert reaches(before + 4e5, math.inf), "the measurement does not see an answer that waits"
    held.result()
    for seed in range(3):
        client.submit(*request(2000, seed)).result()
        client.submit(*request(2000, seed))  # an answer that nobody asks for
        client.decode(request(200, seed)[0])
    assert reaches(0, before + 1e5)


def test_a_lost_pool_is_an_error(ray_session: None, model: RewardModel) -> None:
    config = RewardPoolConfig(num_actors=1, cpus_per_actor=0.5, timeout_s=600)
    with start_reward_pool(SPEC, config, model=model, placement_timeout_s=600, max_restarts=0) as pool:
        client = pool.client()
        pid = ray.get(pool.actors[0].process_id.remote())
        pending = client.submit(*request(2000))
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(RewardError, match=r"all 1 reward actors are dead \(.*\); restart the run with --resume"):
            pending.result()
        pool.shutdown()
        with pytest.raises(RewardError, match="all 1 reward actors are dead"):
            client.submit(*request(2)).result()


def test_a_pool_that_cannot_start(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.num_actors is 0"):
        start_reward_pool(SPEC, RewardPoolConfig(num_actors=0))
    big = RewardPoolConfig(num_actors=2, cpus_per_actor=64)
    with pytest.raises(ResourceError, match=r"asks for 2 actors with 64 CPUs .* the cluster has 4 CPUs"):
        start_reward_pool(SPEC, big, placement_timeout_s=1)
    missing = RewardModelSpec(base_model=str(tmp_path / "nowhere"), classifiers={})
    with pytest.raises(ModelError, match="nowhere does not exist"):
        start_reward_pool(missing, RewardPoolConfig(num_actors=1, cpus_per_actor=0.5))
