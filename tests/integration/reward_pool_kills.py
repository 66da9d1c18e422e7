"""Twenty actors of a pool of two are killed while three clients ask: a driver of its own, because Ray's state API (what
objects are left?) needs the dashboard, which the tests' shared Ray does without. Prints what happened as JSON."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import threading
import time
from typing import Any

import ray
import torch
from ray.util.state import list_objects
from ray.util.state.exception import RayStateApiException
from torch import Tensor

from ctrl_ray.config import RewardPoolConfig
from ctrl_ray.exact.problems import GaussianReward, LogisticReward
from ctrl_ray.rewards.analytic import AnalyticRewardModel
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.pool import RewardPool, start_reward_pool
from ctrl_ray.rewards.protocol import PendingRewards
from ctrl_ray.rewards.spec import RewardModelSpec

KILLS, CLIENTS, SAMPLES, PENDING = 20, 3, 20_000, 3


def make_model() -> AnalyticRewardModel:
    return AnalyticRewardModel({"p": (GaussianReward(2.0, 0.5), LogisticReward(2.5, 0.3))})


def request(seed: int) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """160 KB of latents: large enough for the object store, not for an inlined answer."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(SAMPLES, 2, generator=generator)
    return (
        latents,
        ["p"] * SAMPLES,
        torch.zeros(SAMPLES, 2, dtype=torch.long),
        torch.rand(SAMPLES, 2, generator=generator),
    )


class Client(threading.Thread):
    """Keeps PENDING requests under way until told to stop, and compares every answer with the one computed here."""

    def __init__(self, rewards: PooledRewards, number: int, stop: threading.Event) -> None:
        super().__init__()
        self.rewards, self.number, self.stop = rewards, number, stop
        self.asked = self.answered = self.equal = 0
        self.error = ""

    def run(self) -> None:
        local = LocalRewards(make_model())
        pending: list[tuple[int, PendingRewards]] = []
        try:
            while pending or not self.stop.is_set():
                while len(pending) < PENDING and not self.stop.is_set():
                    seed = 1_000_000 * self.number + self.asked
                    pending.append((seed, self.rewards.submit(*request(seed))))
                    self.asked += 1
                if not pending:
                    return
                seed, waiting = pending.pop(0)
                answer, expected = waiting.result(), local.submit(*request(seed)).result()
                self.answered += 1
                assert answer.cotangent is not None and expected.cotangent is not None
                self.equal += torch.equal(answer.log_probs, expected.log_probs) and torch.equal(
                    answer.cotangent, expected.cotangent
                )
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"


def kill_at_random(pool: RewardPool, clients: list[Client]) -> tuple[int, int]:
    """SIGKILL the process of one actor that has requests, KILLS times; (kills, different processes)."""
    moments = random.Random(0)
    killed: list[int] = []
    while len(killed) < KILLS and not any(client.error for client in clients):
        time.sleep(moments.uniform(0.05, 0.5))  # the random moment itself
        busy = [a.process_id for a in pool.stats().actors if a.ready and a.in_flight and a.process_id not in killed]
        if busy:
            victim = moments.choice(busy)
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            killed.append(victim)
    return len(killed), len(set(killed))


def objects() -> list[Any]:
    """What Ray's state API lists of this Ray (others may run on the machine), without the handles of actors, which take
    no room in the object store. The API refuses a list that changed while it was counted: it is asked again."""
    for attempt in range(200):
        try:
            listed = list_objects(address=ray.get_runtime_context().gcs_address, limit=10_000)
            return [item for item in listed if item.reference_type != "ACTOR_HANDLE"]
        except RayStateApiException:
            if attempt == 199:
                raise
            time.sleep(0.3)
    raise AssertionError("unreachable")


def objects_left(given: int) -> list[str]:
    """What Ray's state API lists beside `given` objects, once it has settled, for at most a minute."""
    deadline = time.monotonic() + 60
    while True:
        gc.collect()
        left = objects()
        if len(left) <= given or time.monotonic() > deadline:
            return [f"{item.object_size} {item.reference_type} {item.call_site}" for item in left]
        time.sleep(0.3)


def main() -> None:
    torch.set_num_threads(1)
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=200 * 2**20,
        include_dashboard=True,
        configure_logging=False,
        log_to_driver=False,
    )
    spec = RewardModelSpec(base_model="unused: the model is given", classifiers={})
    config = RewardPoolConfig(num_actors=2, cpus_per_actor=0.25, timeout_s=120, max_pending_per_worker=PENDING)
    with start_reward_pool(spec, config, model=make_model()) as pool:
        held = pool.client().submit(*request(-1))
        seen = len(objects())
        held.result()
        del held
        stop = threading.Event()
        clients = [Client(pool.client(), number, stop) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        start = time.monotonic()
        kills, processes = kill_at_random(pool, clients)
        stop.set()
        for client in clients:
            client.join()
        stats, seconds = pool.stats(), time.monotonic() - start
        counts = [(client.asked, client.answered, client.equal) for client in clients]
        errors = [client.error for client in clients if client.error]
        clients.clear()
        del client
        inside = objects_left(given=1)  # the model that new actors read
    after = objects_left(given=0)
    print(
        json.dumps(
            {
                "kills": kills,
                "processes": processes,
                "seconds": round(seconds, 1),
                "counts": counts,
                "errors": errors,
                "pool_requests": stats.requests,
                "resent": stats.resent,
                "replaced": stats.replaced,
                "failed": stats.failed,
                "seen_while_one_waits": seen,
                "left_in_the_open_pool": inside,
                "left_after": after,
            }
        )
    )
    ray.shutdown()


if __name__ == "__main__":
    main()
