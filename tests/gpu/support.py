"""What GPU tests and the benchmark share: the device, comparisons, processes of engines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctrl_ray.distributed.environment import worker_environment
from ctrl_ray.policy.controlled import ControlledPolicy

CPU = torch.device("cpu")
ON = "CTRL_RAY_GPU_TESTS_ON"
"""Environment: 'cpu' runs these tests there, to know that their own code works."""
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


def device_under_test() -> torch.device:
    """The first card, or what the environment says."""
    return torch.device(os.environ.get(ON, "cuda:0"))


def set_tf32(allowed: bool) -> None:
    """Whether this process's card multiplies float32 numbers with TF32; off is exact float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch recommends switches that whatever reads these would stumble over
        torch.backends.cuda.matmul.allow_tf32 = allowed
        torch.backends.cudnn.allow_tf32 = allowed


def synchronize(device: torch.device) -> None:
    """Wait for a card."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def difference(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Of all tensors together, relative L2."""
    assert got.keys() == expected.keys()
    error, size = (
        torch.cat([tensor.double().cpu().flatten() for tensor in tensors]).norm()
        for tensors in ([got[name].cpu().double() - expected[name].cpu().double() for name in got], expected.values())
    )
    return float(error / size)


@torch.no_grad()
def move_off_reference(policy: ControlledPolicy, amplitude: float = 0.05) -> None:
    """The same random change of every trained parameter on any device; null rows stay zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_parameters().values():
        parameter += amplitude * torch.randn(parameter.shape, generator=generator).to(parameter)
    for module in policy.modules():
        if isinstance(module, torch.nn.Embedding):
            module.weight[-1] = 0


def run_engines(
    case: str, device: torch.device, pipeline: Path, folder: Path, *, ranks: int = 1, timeout_s: float = 500
) -> Any:
    """What rank 0 of `python -m tests.gpu.engines CASE` says; DeepSpeed builds for one kind of device in a process."""
    environment = {**os.environ, **worker_environment(use_gpu=device.type == "cuda", num_threads=1)}
    command = [sys.executable, "-m", "tests.gpu.engines", case, str(pipeline), str(folder), device.type]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(ranks)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)},
            cwd=Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for rank, (process, output) in enumerate(zip(processes, outputs, strict=True)):
        assert process.returncode == 0, f"rank {rank} of {case} ended with {process.returncode}:\n{output[-6000:]}"
    return json.loads(outputs[0].splitlines()[-1])
