"""Measured over estimated time of an update of the example on this machine: `python -m tests.benchmarks.estimate`.

What `--dry-run` prints is asked for right before and right after the run, whose updates are then timed; 1 is a perfect
estimate, 0.5 to 2 is the aim.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import tempfile
from collections.abc import Sequence

import ray
import torch

import ctrl_ray
from ctrl_ray.config import TrainConfig
from ctrl_ray.planning.cost import CPU_UTILISATION, estimate, measured_cpu_flops
from ctrl_ray.planning.preflight import preflight
from ctrl_ray.reporting.tracking import read_metrics


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=6, help="the first one is not counted")
    arguments = parser.parse_args(argv)
    base = ctrl_ray.preset("shapes")
    with tempfile.TemporaryDirectory(prefix="ctrl_ray_benchmark_") as folder:
        evaluation = dataclasses.replace(base.evaluation, every_updates=0, final_num_samples=64)
        config = dataclasses.replace(
            base, output_dir=f"{folder}/run", num_updates=arguments.updates, evaluation=evaluation, tracker="none"
        )
        estimates = [_estimated(config)]
        run = ctrl_ray.fit(config)
        estimates.append(_estimated(config))
        updates = [row["update_s"] for row in read_metrics(run.folder) if row["kind"] == "update"]
    measured, expected = statistics.median(updates[1:]), statistics.mean(estimates)
    print(f"\nan update  measured {measured:.2f} s, estimated {', '.join(f'{value:.2f} s' for value in estimates)}")
    print(f"ratio      {measured / expected:.2f} at CPU_UTILISATION {CPU_UTILISATION}")
    print(f"machine    {platform.processor() or platform.machine()}, {os.cpu_count()} CPUs; ", end="")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, ray {ray.__version__}")
    return 0


def _estimated(config: TrainConfig) -> float:
    plan = preflight(config, with_estimate=True)
    assert plan.work is not None
    rate = CPU_UTILISATION * measured_cpu_flops(config.scaling.num_threads)
    return estimate(plan.config, plan.work, rate).update_s


if __name__ == "__main__":
    raise SystemExit(main())
