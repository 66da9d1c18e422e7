"""Time of an update under ZeRO 0 to 3 on one and on two workers: `python -m tests.benchmarks.sharding`.

Within a group of workers the stages take turns update by update; groups of one and of two workers take turns as well.
Figures are medians; ratios are to ZeRO-0 on one worker of the same run. Rewards are computed in the workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import platform
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import ray
import torch

from ctrl_ray.cluster.connection import connected
from ctrl_ray.config import ScalingConfig, TrainConfig
from ctrl_ray.distributed.engine import PolicyEngine
from ctrl_ray.distributed.environment import worker_environment
from ctrl_ray.distributed.method import make_method
from ctrl_ray.distributed.worker import set_up_process
from ctrl_ray.distributed.worker_group import WorkerGroup, new_channel, run_workers
from ctrl_ray.driver.classifier import fit_classifier
from ctrl_ray.policy.build import build_policy
from tests.configs import shapes_of_the_paper
from tests.integration.sharding import make_learner

STAGES = (0, 1, 2, 3)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-model", default="shapes", help="'shapes', 'tiny' (random weights), or a folder")
    parser.add_argument("--full-finetune", action="store_true", help="train every weight instead of LoRA")
    parser.add_argument("--global-batch-size", type=int, default=16)
    parser.add_argument("--num-steps", type=int, default=5, help="denoising steps")
    parser.add_argument("--updates", type=int, default=3, help="timed updates of each stage in each round")
    parser.add_argument("--rounds", type=int, default=2, help="how often groups of one and two workers take turns")
    arguments = parser.parse_args(argv)
    times: dict[tuple[int, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="ctrl_ray_benchmark_") as folder, connected(num_cpus=2):
        config = _config(arguments, Path(folder))
        for _ in range(arguments.rounds):
            for workers in (1, 2):
                for stage, seconds in _measure(config, workers, arguments.updates).items():
                    times[workers, stage] += seconds
    _print(times, arguments)
    return 0


def _config(arguments: argparse.Namespace, folder: Path) -> TrainConfig:
    base = shapes_of_the_paper()
    model = arguments.base_model
    if model == "tiny":
        from tests.tiny import make_tiny_pipeline

        model = str(make_tiny_pipeline(folder / "tiny"))
    config = dataclasses.replace(
        base,
        base_model=model,
        data="shapes",
        num_drawn_images=160,
        full_finetune=arguments.full_finetune,
        global_batch_size=arguments.global_batch_size,
        micro_batch_size_per_worker=arguments.global_batch_size // 2,
        sampler=dataclasses.replace(base.sampler, num_steps=arguments.num_steps, reference_steps=0),
        classifier=dataclasses.replace(base.classifier, epochs=1, num_pipeline_samples=0),
        scaling=ScalingConfig(),
    )
    name = next(iter(config.controls))
    fit_classifier(config, name, output_dir=folder / "classifier", quiet=True)
    control = dataclasses.replace(config.controls[name], classifier=str(folder / "classifier"))
    return dataclasses.replace(config, controls={name: control})


def _measure(config: TrainConfig, workers: int, updates: int) -> dict[int, list[float]]:
    scaling = ScalingConfig(num_workers=workers, threads_per_worker=1, max_failures=0, zero3_persistence_threshold=0)
    configs = {
        stage: dataclasses.replace(config, scaling=dataclasses.replace(scaling, zero_stage=stage)) for stage in STAGES
    }
    channel = new_channel()
    with tempfile.TemporaryDirectory(prefix="ctrl_ray_benchmark_") as storage:
        arguments = {"configs": configs, "updates": updates, "channel": channel}
        group = WorkerGroup(
            worker=functools.partial(_work, arguments),
            channel=channel,
            scaling=scaling,
            num_workers=workers,
            storage_path=storage,
            run_name="sharding",
            environment=worker_environment(use_gpu=scaling.use_gpu, num_threads=scaling.num_threads),
        )
        rows: list[Any] = []
        run_workers(group, rows.append)
    (times,) = (row for row in rows if isinstance(row, dict))
    return times


def _work(arguments: dict[str, Any]) -> None:
    learners = {}
    for stage, config in arguments["configs"].items():
        rank = set_up_process(config)
        learners[stage] = make_learner(config, PolicyEngine(build_policy(config), config), rank)
    times: dict[int, list[float]] = {stage: [] for stage in learners}
    for update in range(1 + arguments["updates"]):  # the first one warms up
        for stage, learner in learners.items():
            seconds = make_method(learner.config).update(learner, update)["update_s"]
            if update:
                times[stage].append(seconds)
    if rank.index == 0:
        ray.get(arguments["channel"].put.remote(times))


def _print(times: Mapping[tuple[int, int], list[float]], arguments: argparse.Namespace) -> None:
    first = statistics.median(times[1, 0])
    print(
        f"{os.cpu_count()} × {platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.1f}; "
        f"torch {torch.__version__}, deepspeed {deepspeed.__version__}, ray {ray.__version__}; {vars(arguments)}"
    )
    print(f"{'workers':>7} {'ZeRO':>5} {'median s':>9} {'ratio':>6} {'smallest … largest':>20}")
    for (workers, stage), seconds in sorted(times.items()):
        median = statistics.median(seconds)
        spread = f"{min(seconds):.2f} … {max(seconds):.2f}"
        print(f"{workers:7} {stage:5} {median:9.2f} {median / first:6.2f} {spread:>20}")


if __name__ == "__main__":
    raise SystemExit(main())
