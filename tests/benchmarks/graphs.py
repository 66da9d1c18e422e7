"""What kept graphs save: `python -m tests.benchmarks.graphs`.

CPU seconds of one thread for a trajectory's part of an update of `shapes`, by turns with `estimator.keep_graphs` and without,
in one process, the rewards included.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence

import torch

from ctrl_ray.distributed.update import CTRL
from tests.benchmarks.recipe import as_a_worker, gains, make_learner, shared_rewards, shipped_control, this_machine


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 64])
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args(argv)
    as_a_worker("graphs")
    torch.set_num_threads(1)
    base = gains(shipped_control(), 0).config
    rewards = shared_rewards(base)
    for size in arguments.batch_sizes:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        learners = {}
        for keep in seconds:
            config = dataclasses.replace(
                base,
                global_batch_size=size,
                micro_batch_size_per_worker=size,
                estimator=dataclasses.replace(base.estimator, keep_graphs=keep),
            )
            learners[keep] = make_learner(config, rewards)
            CTRL.of(config).update(learners[keep], 0)  # chooses kernels
        for turn in range(arguments.turns):
            for keep, learner in learners.items():
                start = time.process_time()
                CTRL.of(learner.config).update(learner, 1 + turn)
                seconds[keep].append((time.process_time() - start) / size)
        computed, kept = (statistics.median(seconds[keep]) for keep in (False, True))
        print(
            f"batch {size}: {computed:.4f} CPU s a trajectory, with kept graphs {kept:.4f}, ratio {kept / computed:.2f}"
        )
    print(this_machine())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
