"""Time and memory on a card, the variants of a comparison in one run: `python -m tests.gpu.benchmark`.

An update of `shapes` with its preset's settings, by phase and precision, the precisions in turns; then a denoising step of
a UNet of Stable Diffusion's shape with random weights, by precision, micro-batch and gradient checkpointing, with what the
planner says it takes. Figures go to `tests.gpu.session`, or are printed. What there is no time for is left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ctrl_ray.distributed.environment import worker_environment
from tests.gpu.reporter import MEASURED, record
from tests.gpu.support import device_under_test


def main(argv: Sequence[str] | None = None) -> int:
    """Run what there is time for; 1 where something raised another error than OutOfMemoryError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--within-s", type=float, default=600, help="begin nothing new after this many seconds")
    arguments = parser.parse_args(argv)
    until = time.monotonic() + arguments.within_s
    device = device_under_test()
    # before DeepSpeed is imported, and before the card is used
    os.environ.update(worker_environment(use_gpu=device.type == "cuda", num_threads=1), LOCAL_RANK="0")
    from tests.gpu import timings

    failed = 0
    for name, measure in timings.measures(device):
        if time.monotonic() > until:
            _tell(name, skipped="no time was left")
            continue
        failed += _run(name, measure)
    return min(1, failed)


def _run(name: str, measure: Callable[[], dict[str, Any]]) -> int:
    """Tell what a measure finds, or why it finds nothing; 1 for an error that is no lack of memory."""
    import torch

    started = time.monotonic()
    try:
        figures, failed = measure(), 0
    except torch.cuda.OutOfMemoryError:
        figures, failed = {"out_of_memory": True}, 0
    except Exception as error:
        figures, failed = {"error": f"{type(error).__name__}: {error}"[:1000]}, 1
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    _tell(name, **figures, took_s=round(time.monotonic() - started, 1))
    return failed


def _tell(name: str, **figures: Any) -> None:
    record(name, **figures)
    if not os.environ.get(MEASURED):
        print(name, figures, flush=True)


if __name__ == "__main__":
    sys.exit(main())
