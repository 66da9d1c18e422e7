"""The pool against the same model in this process, and what it does when an actor is lost, late or wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import os
import pickle
import shutil
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import ray
import torch
from torch import Tensor

from ctrl_ray.config import ControlConfig, RewardPoolConfig
from ctrl_ray.distributed.method import make_method
from ctrl_ray.errors import ConfigError, ModelError, NonFiniteError, ResourceError, RewardError
from ctrl_ray.exact.suite import Effort, gaussian
from ctrl_ray.rewards import pool as reward_pool
from ctrl_ray.rewards.analytic import AnalyticRewardModel
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.model import RewardModel, RewardModelSpec
from ctrl_ray.rewards.pool import RewardPool, start_reward_pool
from ctrl_ray.rewards.protocol import RewardAnswer
from tests.analytic import make_learner
from tests.classifiers import save_classifier
from tests.unit.rewards.small import light_model, request

pytestmark = pytest.mark.integration

SPEC = RewardModelSpec(base_model="unused: the model is given", classifiers={})


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return light_model()


@pytest.fixture(scope="module")
def pool(ray_session: None, model: RewardModel) -> Iterator[RewardPool]:
    config = RewardPoolConfig(num_actors=2, cpus_per_actor=0.5, timeout_s=600)
    with start_reward_pool(SPEC, config, model=model, placement_timeout_s=600) as pool:
        yield pool


def assert_agree(answer: RewardAnswer, expected: RewardAnswer) -> None:
    """The bars of the project: log-probabilities to 1e-5 absolute, cotangents to 1e-4 relative L2."""
    assert answer.cotangent is not None and expected.cotangent is not None
    assert float((answer.log_probs - expected.log_probs).abs().max()) <= 1e-5
    assert float((answer.cotangent - expected.cotangent).norm() / expected.cotangent.norm()) <= 1e-4


def process_ids(pool: RewardPool) -> list[int]:
    return [actor.process_id for actor in pool.stats().actors if actor.process_id is not None]


def unfinished(pool: RewardPool) -> int:
    stats = pool.stats()
    return stats.queue_length + stats.in_flight


@contextlib.contextmanager
def stopped(pids: Sequence[int]) -> Iterator[None]:
    """Processes that do nothing for a while; those that live go on at the end."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def wait_until(holds: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it did not come to hold"
        time.sleep(0.05)


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

    assert_agree(RewardAnswer(*ray.get(work.remote(pool.client()))), model.evaluate(*request(5)))


def test_a_worker_that_has_too_many_requests_waits_until_one_is_answered(pool: RewardPool) -> None:
    """No actor answers while their processes are stopped; the worker's third request then has to wait."""
    client = PooledRewards(pool._dispatchers, pool.controls, timeout_s=60, chunk_size=32, max_pending=2)
    third = threading.Thread(target=lambda: pending.append(client.submit(*request(3, seed=2))))
    with stopped(process_ids(pool)):
        pending = [client.submit(*request(3, seed)) for seed in range(2)]
        third.start()
        third.join(timeout=1.0)
        assert third.is_alive() and unfinished(pool) == 2
    third.join(timeout=60)
    assert len({wait.result().log_probs.sum().item() for wait in pending}) == 3


def test_requests_are_spread_over_the_actors(pool: RewardPool) -> None:
    client = pool.client()
    with stopped(process_ids(pool)):
        pending = [client.submit(*request(3, seed)) for seed in range(4)]
        wait_until(lambda: sorted(actor.in_flight for actor in pool.stats().actors) == [2, 2])
    for waiting in pending:
        waiting.result()


def test_errors_of_the_evaluation_come_through(pool: RewardPool) -> None:
    client = pool.client()
    latents, prompts, labels, weights = request(6)
    poisoned = latents.clone()
    poisoned[3] = math.nan
    with pytest.raises(NonFiniteError, match=r"^latents are not finite for 1 of 6 samples \(positions 3 of"):
        client.submit(poisoned, prompts, labels, weights).result()
    with pytest.raises(ConfigError, match=r"^label 13 of control 'jpeg_size' is out of range"):
        client.submit(latents, prompts, labels + 9, weights).result()
    with pytest.raises(RewardError, match=r"^a reward actor failed: "):
        client._call("decode", ("no array",), 1).result(None)
    assert client.submit(latents, prompts, labels, weights).result().log_probs.shape == (6, 2)


def test_a_late_answer_is_an_error(pool: RewardPool) -> None:
    """No actor answers while their processes are stopped."""
    with stopped(process_ids(pool)):
        pending = pool.client().submit(*request(3))
        with pytest.raises(
            RewardError, match=r"gave no answer within 0\.2 s; it may only be slow.*rewards\.num_actors"
        ):
            pending.result(timeout_s=0.2)
    assert pending.result().log_probs.shape == (3, 2)  # only that wait was too short


@pytest.mark.full
def test_a_killed_actors_requests_are_answered_by_others_and_it_is_replaced(
    pool: RewardPool, model: RewardModel
) -> None:
    """Both actors are stopped until each has two requests; one of them then never goes on."""
    before = pool.stats()
    pids = process_ids(pool)
    requests = [request(30, seed) for seed in range(4)]
    client = pool.client()
    with stopped(pids):
        pending = [client.submit(*arguments) for arguments in requests]
        wait_until(lambda: sorted(actor.in_flight for actor in pool.stats().actors) == [2, 2])
        os.kill(pids[0], signal.SIGKILL)
    for waiting, arguments in zip(pending, requests, strict=True):
        assert_agree(waiting.result(), model.evaluate(*arguments))
    after = pool.stats()
    assert after.requests - before.requests == 4 and after.resent - before.resent == 2
    assert after.replaced - before.replaced == 1 and pids[0] not in [actor.process_id for actor in after.actors]
    wait_until(lambda: pool.stats().num_ready == 2)


@pytest.mark.full
def test_a_killed_front_of_the_pool_comes_back_and_repeats_what_was_under_way(
    pool: RewardPool, model: RewardModel
) -> None:
    """With new actors; Ray ends those of a dispatcher that died. Until then they are stopped."""
    old = process_ids(pool)
    requests = [request(30, seed) for seed in range(4)]
    client = pool.client()
    with stopped(old):
        pending = [client.submit(*arguments) for arguments in requests]
        wait_until(lambda: unfinished(pool) == 4)
        (dispatcher,) = [
            process.pid
            for process in psutil.Process(old[0]).parent().children()
            if "RewardDispatcher" in " ".join(process.cmdline())
        ]
        os.kill(dispatcher, signal.SIGKILL)
    for waiting, arguments in zip(pending, requests, strict=True):
        assert_agree(waiting.result(), model.evaluate(*arguments))
    wait_until(lambda: pool.stats().num_ready == 2)
    assert not set(old) & set(process_ids(pool))


@pytest.mark.full
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


@pytest.mark.full
def test_a_stuck_actor_is_replaced_and_its_request_goes_to_another(ray_session: None, model: RewardModel) -> None:
    config = RewardPoolConfig(num_actors=2, cpus_per_actor=0.5, timeout_s=5)
    with start_reward_pool(SPEC, config, model=model, placement_timeout_s=600) as pool:
        client = pool.client()
        client.submit(*request(2)).result()
        stuck = process_ids(pool)[0]
        os.kill(stuck, signal.SIGSTOP)
        try:
            pending = [client.submit(*request(5, seed)) for seed in range(2)]
            answers = [waiting.result() for waiting in pending]
        finally:
            after = process_ids(pool)
        for seed, answer in enumerate(answers):
            assert_agree(answer, model.evaluate(*request(5, seed)))
        assert stuck not in after
        assert pool.stats().replaced == 1 and pool.stats().failed == 0
        wait_until(lambda: pool.stats().num_ready == 2 and not psutil.pid_exists(stuck))


@pytest.mark.full
def test_a_stuck_pool_is_an_error_and_recovers(ray_session: None, model: RewardModel) -> None:
    config = RewardPoolConfig(num_actors=1, cpus_per_actor=0.5, timeout_s=5)
    with start_reward_pool(SPEC, config, model=model, placement_timeout_s=600) as pool:
        client = pool.client()
        os.kill(process_ids(pool)[0], signal.SIGSTOP)
        with pytest.raises(RewardError, match=r"gave no answer within rewards\.timeout_s = 5 s, and .* no other one"):
            client.submit(*request(5)).result()
        wait_until(lambda: pool.stats().num_ready == 1)
        assert_agree(client.submit(*request(5)).result(), model.evaluate(*request(5)))


@pytest.mark.full
def test_a_request_that_loses_every_actor_is_an_error(ray_session: None, model: RewardModel) -> None:
    """It is sent again three times; the others that were lost with it are answered."""
    config = RewardPoolConfig(num_actors=1, cpus_per_actor=0.5, timeout_s=600)
    with start_reward_pool(SPEC, config, model=model, placement_timeout_s=600) as pool:
        client = pool.client()
        heavy, light = client.submit(*request(20_000)), client.submit(*request(5))
        for lost in range(4):
            wait_until(lambda: any(actor.in_flight for actor in pool.stats().actors))
            os.kill(process_ids(pool)[0], signal.SIGKILL)
            wait_until(lambda lost=lost: pool.stats().replaced == lost + 1)  # type: ignore[misc]
        with pytest.raises(RewardError, match=r"^a reward request was lost 4 times, .*lower micro_batch_size_per"):
            heavy.result()
        assert_agree(light.result(), model.evaluate(*request(5)))
        pool.shutdown()
        with pytest.raises(RewardError, match="the reward pool was stopped"):
            client.submit(*request(2)).result()


@pytest.mark.full
def test_a_pool_whose_actors_cannot_start_again_is_an_error(
    ray_session: None, tiny_pipeline: Path, tmp_path: Path
) -> None:
    """The base model's folder is gone by the time that the actor is lost."""
    folder = tmp_path / "pipeline"
    shutil.copytree(tiny_pipeline, folder)
    save_classifier(tmp_path / "classifier", "size", ControlConfig(classes=("low", "high")))
    spec = RewardModelSpec(base_model=str(folder), classifiers={"size": str(tmp_path / "classifier")})
    config = RewardPoolConfig(num_actors=1, cpus_per_actor=0.5, timeout_s=25)
    latents, prompts, labels, weights = request(3)
    with start_reward_pool(spec, config, placement_timeout_s=600) as pool:
        client = pool.client()
        assert client.submit(latents, prompts, labels[:, :1] % 2, weights[:, :1]).result().log_probs.shape == (3, 1)
        shutil.rmtree(folder)
        os.kill(process_ids(pool)[0], signal.SIGKILL)
        with pytest.raises(RewardError, match=r"no reward actor has been alive .*failed: .*does not exist.*--resume"):
            client.submit(latents, prompts, labels[:, :1] % 2, weights[:, :1]).result()


@pytest.mark.full
def test_requests_that_wait_together_share_a_forward(ray_session: None, model: RewardModel) -> None:
    """Four of 3 samples: the first alone, three together; one that cannot be answered fails alone."""
    config = RewardPoolConfig(
        num_actors=1, cpus_per_actor=0.5, timeout_s=600, deterministic=False, max_batch_size=9, max_batch_delay_s=30.0
    )
    with start_reward_pool(SPEC, config, model=model, placement_timeout_s=600) as pool:
        clients = [pool.client() for _ in range(3)]
        pending = [client.submit(*request(3, seed)) for seed, client in enumerate(clients)]  # 9 samples: no delay
        for seed, waiting in enumerate(pending):
            assert_agree(waiting.result(), model.evaluate(*request(3, seed)))
        stats = pool.stats()
        assert (stats.requests, stats.samples, stats.forwards) == (3, 9, 1)
        requests = [request(3, seed) for seed in range(3)]
        requests[1][0][2] = math.nan
        pending = [client.submit(*arguments) for client, arguments in zip(clients, requests, strict=True)]
        with pytest.raises(NonFiniteError, match=r"latents are not finite for 1 of 3 samples \(positions 2 of"):
            pending[1].result()
        for seed in (0, 2):
            assert_agree(pending[seed].result(), model.evaluate(*requests[seed]))


@pytest.mark.full
def test_a_pool_grows_with_its_queue_and_shrinks_again(ray_session: None, model: RewardModel) -> None:
    config = RewardPoolConfig(
        num_actors=1, max_actors=2, cpus_per_actor=0.5, grow_after_s=0.5, shrink_after_s=1.0, timeout_s=600
    )
    with start_reward_pool(SPEC, config, model=model, placement_timeout_s=600) as pool:
        client = pool.client()
        with stopped(process_ids(pool)):  # requests pile up
            pending = [client.submit(*request(5, seed)) for seed in range(4)]
            wait_until(lambda: pool.stats().num_ready == 2)
        for seed, waiting in enumerate(pending):
            assert_agree(waiting.result(), model.evaluate(*request(5, seed)))
        wait_until(lambda: len(pool.stats().actors) == 1)
        assert_agree(client.submit(*request(5)).result(), model.evaluate(*request(5)))
        assert pool.stats().replaced == 0 and pool.stats().failed == 0


@pytest.mark.full
def test_growth_without_room_is_no_error(ray_session: None, model: RewardModel) -> None:
    config = RewardPoolConfig(num_actors=1, max_actors=2, cpus_per_actor=2.6, grow_after_s=0.2, timeout_s=600)
    with start_reward_pool(SPEC, config, model=model, placement_timeout_s=600) as pool:
        (pid,) = process_ids(pool)
        with stopped([pid]):
            client = pool.client()
            pending = [client.submit(*request(5, seed)) for seed in range(4)]
            wait_until(lambda: len(pool.stats().actors) == 2)
        for seed, waiting in enumerate(pending):
            assert_agree(waiting.result(), model.evaluate(*request(5, seed)))
        assert [actor.process_id for actor in pool.stats().actors] == [pid, None]


@pytest.mark.full
def test_figures_reach_ray_metrics(pool: RewardPool) -> None:
    """Scraped from the node's own exporter; Ray collects every ten seconds."""
    pool.client().submit(*request(5)).result()
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def values(name: str) -> float:
        text = urllib.request.urlopen(url, timeout=30).read().decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name + "{"))

    prefix = "ray_ctrl_ray_reward_"
    wait_until(lambda: values(prefix + "latency_s_count") >= 1, timeout_s=90)
    stats = pool.stats()
    wait_until(lambda: values(prefix + "requests_total") >= stats.requests, timeout_s=90)
    assert values(prefix + "samples_total") >= values(prefix + "requests_total")
    assert values(prefix + "actors") >= 2


@pytest.mark.full
def test_the_next_micro_batch_is_rolled_out_while_the_pool_scores(ray_session: None) -> None:
    """The pool's only actor is stopped: both micro-batches of an update still reach it, before it answers either."""
    case = dataclasses.replace(gaussian(), effort=Effort(num_updates=1, batch_size=64))
    config = RewardPoolConfig(num_actors=1, cpus_per_actor=0.5, timeout_s=600)
    model = AnalyticRewardModel({case.title: case.problem.rewards})
    with start_reward_pool(SPEC, config, model=model, placement_timeout_s=600) as pool:
        learner, _ = make_learner(case)
        learner = dataclasses.replace(
            learner,
            rewards=pool.client(),
            config=dataclasses.replace(learner.config, micro_batch_size_per_worker=32, rewards=config),
        )
        metrics: dict[str, float] = {}
        update = threading.Thread(target=lambda: metrics.update(make_method(learner.config).update(learner, 0)))
        with stopped(process_ids(pool)):
            update.start()
            wait_until(lambda: unfinished(pool) == 2)
            assert pool.stats().requests == 0 and update.is_alive()
        update.join(timeout=120)
        assert pool.stats().requests == 2 and math.isfinite(metrics["loss"])


@pytest.mark.full
def test_two_dispatchers_know_nothing_of_each_other(
    ray_session: None, model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has one of the two workers and of the two actors; that of one is lost, and the other one's answers meanwhile."""
    monkeypatch.setattr(reward_pool, "WORKERS_A_DISPATCHER", 1)
    config = RewardPoolConfig(num_actors=2, cpus_per_actor=0.5, timeout_s=600)
    with start_reward_pool(SPEC, config, num_workers=2, model=model, placement_timeout_s=600) as pool:
        clients = [pickle.loads(pickle.dumps(pool.client().for_worker(rank))) for rank in range(2)]
        first, second = process_ids(pool)
        with stopped([first]):
            late = clients[0].submit(*request(5, seed=1))
            assert_agree(clients[1].submit(*request(5, seed=2)).result(), model.evaluate(*request(5, seed=2)))
            stats = pool.stats()
            assert [actor.in_flight for actor in stats.actors] == [1, 0] and stats.requests == 1
            os.kill(first, signal.SIGKILL)
        assert_agree(late.result(), model.evaluate(*request(5, seed=1)))
        after = pool.stats()
        assert (after.requests, after.replaced, after.resent, after.failed) == (2, 1, 1, 0)
        assert second in process_ids(pool) and first not in process_ids(pool)


@pytest.mark.full
def test_a_pool_that_cannot_start(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rewards\.num_actors is 0"):
        start_reward_pool(SPEC, RewardPoolConfig(num_actors=0))
    big = RewardPoolConfig(num_actors=2, cpus_per_actor=64)
    with pytest.raises(ResourceError, match=r"asks for 2 actors with 64 CPUs .* the cluster has 4 CPUs"):
        start_reward_pool(SPEC, big, placement_timeout_s=1)
    missing = RewardModelSpec(base_model=str(tmp_path / "nowhere"), classifiers={})
    with pytest.raises(ModelError, match="nowhere does not exist"):
        start_reward_pool(missing, RewardPoolConfig(num_actors=1, cpus_per_actor=0.5))
