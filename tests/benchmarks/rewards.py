"""What remoteness of the rewards costs: seconds per update with local rewards, with a pool that is waited for, and with
a pool that scores while the next micro-batch is rolled out.

    taskset -c 0,1 python -m tests.benchmarks.rewards --pool-cores 1 --updates 7

The three take turns, update by update, on one policy (the `shapes` pipeline) in this process; medians and their ratios
to local rewards are printed with the hardware and versions. With --pool-cores the actors are pinned to those cores and
this process to the others, so that the pool has cores of its own; the bar is then a ratio of at most 1.05, overlapped.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import psutil
import ray
import torch
import torch.distributed as dist
from torch import Tensor

from ctrl_ray.cluster.connection import connected
from ctrl_ray.config import RewardPoolConfig, ScalingConfig, TrainConfig
from ctrl_ray.distributed.engine import PolicyEngine
from ctrl_ray.distributed.learner import Learner, Rank
from ctrl_ray.distributed.method import make_method
from ctrl_ray.distributed.worker import TrainJob, load_prompts, make_learner
from ctrl_ray.offline.prompts import training_prompts
from ctrl_ray.policy.build import build_policy
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.local import LocalPendingRewards
from ctrl_ray.rewards.pool import RewardPool, start_reward_pool
from ctrl_ray.rewards.protocol import Rewards
from ctrl_ray.rewards.spec import RewardModelSpec
from tests.configs import shapes_of_the_paper


class NotOverlapped:
    """A pool whose answer is waited for at once."""

    differentiable = True

    def __init__(self, pooled: PooledRewards) -> None:
        self.pooled, self.controls = pooled, pooled.controls

    def submit(self, latents: Tensor, prompts: tuple[str, ...], labels: Tensor, weights: Tensor) -> LocalPendingRewards:
        answer = self.pooled.submit(latents, prompts, labels, weights).result()
        return LocalPendingRewards(lambda: answer)


def benchmark_config(samples: int, micro_batch: int) -> TrainConfig:
    """`shapes`, one thread here and one in the pool."""
    return dataclasses.replace(
        shapes_of_the_paper(),
        num_updates=1000,
        global_batch_size=samples,
        micro_batch_size_per_worker=micro_batch,
        rewards=RewardPoolConfig(threads_per_actor=1, decode_chunk_size=64),
        scaling=ScalingConfig(num_workers=1, threads_per_worker=1),
    )


def pin(pool: RewardPool, cores: list[int]) -> list[int]:
    """Give the pool's processes these cores and this process the others; returns those."""
    mine = [core for core in os.sched_getaffinity(0) if core not in cores]
    for actor in pool.stats().actors:
        for thread in psutil.Process(actor.process_id).threads():
            os.sched_setaffinity(thread.id, cores)
    for thread in psutil.Process().threads():
        os.sched_setaffinity(thread.id, mine)
    return mine


def measure(learner: Learner, variants: dict[str, Rewards], updates: int) -> dict[str, list[dict[str, float]]]:
    """Metrics of `updates` updates of each, in turns, after one of each that is not counted."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    for update in range(updates + 1):
        for name, rewards in variants.items():
            start = time.perf_counter()
            metrics = make_method(learner.config).update(dataclasses.replace(learner, rewards=rewards), update)
            if update:
                results[name].append({**metrics, "update_s": time.perf_counter() - start})
    return results


def report(results: dict[str, list[dict[str, float]]], print_line: Callable[[str], None] = print) -> None:
    def median(name: str, metric: str) -> float:
        return statistics.median(row[metric] for row in results[name])

    local = median("local", "update_s")
    print_line(f"{'rewards':24} {'update_s':>9} {'ratio':>7} {'rollout_s':>10} {'wait_s':>8} {'backward_s':>8}")
    for name in results:
        row = [median(name, metric) for metric in ("update_s", "rollout_s", "reward_wait_s", "backward_s")]
        print_line(f"{name:24} {row[0]:9.3f} {row[0] / local:7.3f} {row[1]:10.3f} {row[2]:8.3f} {row[3]:8.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=7, help="counted updates of each kind")
    parser.add_argument("--samples", type=int, default=128, help="global batch")
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--pool-cores", type=int, nargs="*", default=[], help="cores for the pool alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(DS_ACCELERATOR="cpu", LOCAL_RANK="0")  # DeepSpeed wants both; Ray Train sets them for a worker
    config = benchmark_config(arguments.samples, arguments.micro_batch)
    spec = RewardModelSpec(
        base_model=config.base_model,
        classifiers={name: str(control.classifier) for name, control in config.controls.items()},
        decode_chunk_size=config.rewards.decode_chunk_size,
    )
    with tempfile.NamedTemporaryFile() as store, connected(2):
        dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        with start_reward_pool(spec, config.rewards) as pool:
            pooled = pool.client()
            prompts = training_prompts(config)
            info: Any = None  # nothing is exported
            job = TrainJob(
                config=config, controls=config.controls, prompts=prompts, rewards=spec, info=info, channel=None
            )
            rank = Rank(0, 1, torch.device("cpu"))
            learner = make_learner(job, rank, PolicyEngine(build_policy(config), config), load_prompts(job, rank))
            mine = pin(pool, arguments.pool_cores) if arguments.pool_cores else sorted(os.sched_getaffinity(0))
            variants: dict[str, Rewards] = {
                "local": learner.rewards,
                "pooled, waited for": NotOverlapped(pooled),  # type: ignore[dict-item]
                "pooled, overlapped": pooled,
            }
            print(
                f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores (updates on {mine}, pool on "
                f"{arguments.pool_cores or 'the same'}), load {os.getloadavg()[0]:.1f}; torch {torch.__version__}, ray "
                f"{ray.__version__}; shapes, {config.global_batch_size} samples in micro-batches of "
                f"{config.micro_batch_size_per_worker}, medians of {arguments.updates} in turns"
            )
            report(measure(learner, variants, arguments.updates))
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
