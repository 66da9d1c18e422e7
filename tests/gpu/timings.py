"""What the benchmark measures, each part a function that returns its figures. DeepSpeed is imported here."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.engine import PolicyEngine
from ctrl_ray.distributed.learner import Learner
from ctrl_ray.distributed.method import make_method
from ctrl_ray.distributed.worker_group import process_group_backend
from ctrl_ray.gradients.estimators import Full
from ctrl_ray.planning.counts import PolicyCounter
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.precision import set_float32_precision
from tests.configs import shapes_of_the_paper
from tests.gpu.sd_shaped import CONTROLS, random_micro_batch, random_policy, sd_config, write_sd_shaped
from tests.gpu.support import PRECISIONS, synchronize
from tests.learners import learner_on

_UPDATES = 3
_REPEATS = 3
_STEPS = (("bf16", (8, 4)), ("fp16", (8, 4)), ("tf32", (8, 4)), ("fp32", (4,)))
"""Precision and micro-batches of Stable Diffusion's step, the most wanted first."""
_PHASES = ("update_s", "rollout_s", "reward_wait_s", "backward_s", "samples_per_s")

Measures = Iterator[tuple[str, Callable[[], dict[str, Any]]]]


def measures(device: torch.device) -> Measures:
    """Names, and what is to be called; in this order, for some leave something to the next."""
    small = device.type != "cuda"
    yield "an update of shapes", functools.partial(shapes_updates, device, small=small)
    with tempfile.TemporaryDirectory(prefix="ctrl_ray_benchmark_") as folder:
        pipeline = write_sd_shaped(Path(folder), tiny=small)
        for precision, sizes in _STEPS:
            model = _Model(pipeline, precision, device)
            for checkpointing in (False, True):
                for size in (1,) if small else sizes:
                    name = f"a step of Stable Diffusion, {precision}, {size}" + (", checkpointed" * checkpointing)
                    yield name, functools.partial(model.step, size, checkpointing=checkpointing)
            del model
        for checkpointing in (False, True):
            size = 1 if small else 8
            name = f"what the planner says of it, bf16, {size}" + (", checkpointed" * checkpointing)
            config = sd_config(pipeline, "bf16", size, checkpointing=checkpointing)
            yield name, functools.partial(planned_step, config)


def shapes_updates(device: torch.device, *, small: bool) -> dict[str, Any]:
    """Medians of updates after the first, by precision, rewards on the device; precisions take turns. Also the most memory
    that an update of each took beyond what all of them together keep."""
    shapes = shapes_of_the_paper()
    if small:
        shapes = dataclasses.replace(
            shapes,
            global_batch_size=2,
            micro_batch_size_per_worker=2,
            sampler=dataclasses.replace(shapes.sampler, num_steps=2),
        )
    dist.init_process_group(
        process_group_backend(use_gpu=device.type == "cuda"), store=dist.HashStore(), rank=0, world_size=1
    )
    learners = {precision: _learner(shapes, precision, device) for precision in PRECISIONS}
    rows: dict[str, list[dict[str, float]]] = {precision: [] for precision in learners}
    for update in range(1 + _UPDATES):
        for precision, learner in learners.items():
            set_float32_precision(precision)  # type: ignore[arg-type]
            before = _reset_peak(device)
            row = make_method(learner.config).update(learner, update)
            if update:
                rows[precision].append({**row, "peak_bytes": _peak(device) - before})
    dist.destroy_process_group()
    names = (*_PHASES, "peak_bytes")
    return {p: {name: statistics.median(row[name] for row in found) for name in names} for p, found in rows.items()}


def _learner(config: TrainConfig, precision: Any, device: torch.device) -> Learner:
    scaling = dataclasses.replace(config.scaling, precision=precision, use_gpu=device.type == "cuda")
    config = dataclasses.replace(config, scaling=scaling, rewards=dataclasses.replace(config.rewards, num_actors=0))
    return learner_on(config, device, pool=False, make_engine=lambda policy: PolicyEngine(policy, config))


class _Model:
    """Stable Diffusion's denoiser in one precision, made when it is first asked for and measured in turns."""

    def __init__(self, pipeline: Path, precision: Any, device: torch.device) -> None:
        self._pipeline, self._precision, self._device = pipeline, precision, device
        self._policy: ControlledPolicy | None = None
        self._checkpointed = False
        self._before = 0

    def step(self, size: int, *, checkpointing: bool) -> dict[str, Any]:
        """Medians in ms: a forward as in a rollout, the policy's forward with its graph and its backward, and a whole step
        of the adjoint pass (policy, reference, both backwards). And the most memory of such a step, weights included."""
        device, config = self._device, sd_config(self._pipeline, self._precision, size, checkpointing=checkpointing)
        set_float32_precision(self._precision)
        if self._policy is None:
            self._before = _reset_peak(device)
            self._policy = random_policy(
                dataclasses.replace(config, scaling=dataclasses.replace(config.scaling, gradient_checkpointing=False)),
                device,
            )
        policy = self._policy
        if checkpointing and not self._checkpointed:
            policy.enable_gradient_checkpointing()
            self._checkpointed = True
        batch, _ = random_micro_batch(policy, config, device)
        carried = torch.randn_like(batch.trajectory.latents[0]) / size
        times: dict[str, list[float]] = {"forward": [], "graph": [], "backward": [], "adjoint_step": []}
        peak = 0
        for repeat in range(1 + _REPEATS):
            with torch.no_grad():
                forward, _ = _timed(device, lambda: batch.step(0, batch.leaf(0), reference=False))
            graph, law = _timed(device, lambda: batch.step(0, batch.leaf(0), reference=False))
            backward, _ = _timed(device, (law.mean * carried).sum().backward)
            del law
            policy.zero_grad()
            _reset_peak(device)
            whole, _ = _timed(device, lambda: Full().pull_back(batch, 0, carried, 1.0))
            peak = max(peak, _peak(device) - self._before)
            policy.zero_grad()
            if repeat:
                for name, seconds in zip(times, (forward, graph, backward, whole), strict=True):
                    times[name].append(1000 * seconds)
        figures = {f"{name}_ms": round(statistics.median(values), 2) for name, values in times.items()}
        return {**figures, "peak_bytes": peak, "weights": str(next(policy.denoiser.parameters()).dtype)}


def planned_step(config: TrainConfig) -> dict[str, int]:
    """Bytes of a whole step as the planner counts them: weights, gradients, and what is alive beside them."""
    counter = PolicyCounter(config, CONTROLS)
    policy = counter._policy
    weights = sum(p.numel() * p.element_size() for p in policy.parameters())
    gradients = sum(p.numel() * p.element_size() for p in policy.trainable_parameters().values())
    step = counter.step(config.micro_batch_size_per_worker)
    return {"planned_bytes": weights + gradients + step.backward_peak, "activations": step.backward_peak}


def _timed(device: torch.device, run: Callable[[], Any]) -> tuple[float, Any]:
    synchronize(device)
    started = time.perf_counter()
    result = run()
    synchronize(device)
    return time.perf_counter() - started, result


def _reset_peak(device: torch.device) -> int:
    """Bytes that are allocated now; the peak starts from there."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
