"""The environment of processes that import torch and DeepSpeed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ctrl_ray.distributed.environment import worker_environment


def test_every_process_is_told_its_kind_of_device() -> None:
    """A CPU process sees no card either, whatever Ray shows it."""
    on_cpu = worker_environment(use_gpu=False, num_threads=3)
    assert on_cpu == {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "3"}
    on_gpu = worker_environment(use_gpu=True, num_threads=3)
    assert on_gpu["DS_ACCELERATOR"] == "cuda" and "CUDA_VISIBLE_DEVICES" not in on_gpu
    assert on_gpu["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"


def test_engines_of_the_tests_are_for_the_cpu_also_where_there_is_a_card() -> None:
    """DeepSpeed would take the card for the whole process."""
    script = (
        "import os, torch; torch.cuda.is_available = lambda: True; import tests.conftest; "
        "print(os.environ['DS_ACCELERATOR'])"
    )
    bare = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=bare, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "cpu", done.stderr
