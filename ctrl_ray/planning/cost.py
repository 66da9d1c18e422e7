"""How long a run takes and what it costs: counted operations over a measured or stated rate."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

from ctrl_ray.cluster.resources import ClusterFacts
from ctrl_ray.config import Precision, TrainConfig
from ctrl_ray.diffusion.steps import Guidance
from ctrl_ray.planning.counts import StepFlops
from ctrl_ray.planning.decoder_counts import DecoderCounts
from ctrl_ray.planning.fits import USABLE, card_uses
from ctrl_ray.planning.machines import CARDS
from ctrl_ray.planning.placement import cards_needed, shares_cards
from ctrl_ray.planning.plan import RunPlan, num_branches
from ctrl_ray.wording import duration

PRICES_OF = "us-west-2 on demand, remembered from 2025 and looked up nowhere"
"""What the prices below are; look yours up before you rely on them."""


@dataclass(frozen=True)
class Machine:
    """A GPU machine that `cluster/aws.yaml` offers."""

    name: str
    gpu: str
    num_gpus: int
    half_flops: float
    """Dense peak of one GPU in bfloat16 and float16, operations a second (the vendor's data sheet)."""
    tf32_flops: float
    """The same in TF32, dense."""
    fp32_flops: float
    """The same in float32."""
    dollars_per_hour: float
    """Of the whole machine, see PRICES_OF. Spot is usually 30 to 70 % cheaper."""

    @property
    def gpu_bytes(self) -> int:
        """Memory of one GPU."""
        return CARDS[self.gpu]

    def flops(self, precision: Precision) -> float:
        """Peak of one GPU at `scaling.precision`."""
        return {"fp32": self.fp32_flops, "tf32": self.tf32_flops}.get(precision, self.half_flops)


AWS_MACHINES = (
    Machine("g5.2xlarge", "A10G", 1, 70e12, 35e12, 31.2e12, 1.21),
    Machine("g6e.2xlarge", "L40S", 1, 362e12, 183e12, 91.6e12, 2.24),
    Machine("p4d.24xlarge", "A100", 8, 312e12, 156e12, 19.5e12, 21.96),
    Machine("p5.48xlarge", "H100", 8, 989e12, 495e12, 66.9e12, 55.04),
    Machine("p5en.48xlarge", "H200", 8, 989e12, 495e12, 66.9e12, 63.30),
)
HEAD_DOLLARS_PER_HOUR = 0.38
"""m6i.2xlarge."""

GPU_UTILISATION = 0.19
"""Share of a GPU's peak that a denoiser of diffusers reaches. Measured on one H200 with a UNet of Stable Diffusion's shape in
bf16, 8 samples with guidance: 0.19 in a forward, 0.20 in a step of the adjoint pass (the times in
tests/gpu/sessions/2026-11-27-h200-runs.json under the counted operations). Other cards are taken to be alike."""
CPU_UTILISATION = 0.3
"""Share of the rate of `measured_cpu_flops` that the example reaches on two cores (`python -m tests.benchmarks.estimate`)."""
_START_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a run computes, per worker."""

    update_flops: float
    """Denoiser operations of an update."""
    evaluation_flops: float
    """Of all evaluations of the run, during training and after it."""
    scoring_flops: float = 0.0
    """Of an update: decoding and its gradient, on the worker's card that scores most; 0 where scoring has cards of its own
    or CPUs. Classifiers are not counted."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Time and price of a run on one kind of machine."""

    update_s: float
    run_s: float
    num_machines: int
    dollars: float | None
    """None: not a rented machine."""


def work_of(config: TrainConfig, plan: RunPlan, flops: StepFlops, decoder: DecoderCounts) -> Work:
    """Per worker, the one with the largest share; `flops` are of a step at the run's micro-batch."""
    share, size = config.worker_shares[1], config.fixed_micro_batch_size
    filled = share / (config.num_micro_batches * size)
    update = filled * (plan.calls.forwards * flops.forward + plan.calls.backwards * flops.backward)
    scored = 0.0
    if not config.draws_trajectories:
        pass
    elif config.scaling.use_gpu and config.rewards.num_actors == 0:
        scored = share
    elif shares_cards(config):
        scored = config.global_batch_size / config.rewards.num_actors
    rows = Guidance.of(config.sampler).num_branches / num_branches(config)
    per_sample = config.sampler.num_steps * rows * flops.forward / size
    return Work(
        update_flops=update,
        evaluation_flops=sum(evaluated_samples(config)) * per_sample / config.scaling.fixed_num_workers,
        scoring_flops=scored * decoder.operations,
    )


class EvaluatedSamples(NamedTuple):
    """Samples that a run draws to be judged."""

    during: int
    """Of the policy, in all evaluations during training."""
    pre_trained: int
    """Of the pre-trained model, at least."""
    after: int
    """Of the policy, after training."""
    pairs: float
    """Drawn again, or a part of their steps, for what no training removes."""


def evaluated_samples(config: TrainConfig) -> EvaluatedSamples:
    """Of a whole run."""
    every, beside = config.evaluation.every_updates, config.evaluation
    return EvaluatedSamples(
        during=(1 + config.num_updates // every) * beside.num_samples if every else 0,
        pre_trained=beside.fewest_pre_trained,
        after=beside.final_num_samples,
        pairs=beside.num_pairs * (1.25 if config.sampler.reference_steps else 1),
    )


def estimate(
    config: TrainConfig,
    work: Work,
    flops_per_s: float,
    machine: Machine | None = None,
    *,
    scoring_flops_per_s: float | None = None,
) -> Estimate:
    """At a sustained rate of one worker, and of scoring on its card (None: the same). A pool with CPUs or cards of its own
    is taken to keep up: it scores while the workers roll out."""
    update_s = work.update_flops / flops_per_s + work.scoring_flops / (scoring_flops_per_s or flops_per_s)
    run_s = _START_S + config.num_updates * update_s + work.evaluation_flops / flops_per_s
    if machine is None:
        return Estimate(update_s=update_s, run_s=run_s, num_machines=1, dollars=None)
    count = math.ceil(cards_needed(config) / machine.num_gpus)
    hourly = count * machine.dollars_per_hour + HEAD_DOLLARS_PER_HOUR
    return Estimate(update_s=update_s, run_s=run_s, num_machines=count, dollars=run_s / 3600 * hourly)


def measured_cpu_flops(num_threads: int, seconds: float = 0.5) -> float:
    """Operations a second of `num_threads` cores of this machine: float32 convolutions of a usual size, forward and
    backward, the best of several on one core, so that what else runs here hardly counts."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        images = torch.randn(16, 64, 16, 16, requires_grad=True)
        weights = torch.randn(64, 64, 3, 3, requires_grad=True)
        operations = 3 * 2 * images.numel() * weights[0].numel()
        best, end = math.inf, time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            torch.nn.functional.conv2d(images, weights, padding=1).sum().backward()
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return num_threads * operations / best


def estimate_lines(config: TrainConfig, plan: RunPlan, work: Work, facts: ClusterFacts | None) -> list[str]:
    """Time, and on rented machines the price, with what is assumed."""
    counted = f"{_flops_text(work.update_flops)} an update and worker (counted)"
    updates = f"{config.num_updates} updates"
    if not config.scaling.use_gpu:
        rate = CPU_UTILISATION * measured_cpu_flops(config.scaling.num_threads)
        found = estimate(config, work, rate)
        return [
            f"estimate   {counted} at {_flops_text(rate)}/s (measured on this machine just now): "
            f"{duration(found.update_s)} an update, {updates} with evaluation {duration(found.run_s)}; wrong by a factor of "
            "2 where the cores are shared"
        ]
    lines = [
        f"estimate   {counted} at {GPU_UTILISATION:.0%} of a GPU's peak (as measured on an H200), {updates} with evaluation; "
        f"prices {PRICES_OF}, spot is cheaper:"
    ]
    precision = config.scaling.precision
    if work.scoring_flops:
        who = (
            "each worker scores its own samples"
            if config.rewards.num_actors == 0
            else "a card with a reward actor scores"
        )
        lines.append(
            f"             {who}: {_flops_text(work.scoring_flops)} of decoding an update (counted), "
            f"{work.scoring_flops / work.update_flops:.1%} of a worker's"
        )
    needed, used = max(use.bytes for use in card_uses(plan, config, facts)), cards_needed(config)
    for machine in AWS_MACHINES:
        scoring = GPU_UTILISATION * machine.flops("fp32" if precision == "fp32" else "tf32")
        rate = GPU_UTILISATION * machine.flops(precision)
        found = estimate(config, work, rate, machine, scoring_flops_per_s=scoring)
        text = (
            f"             {found.num_machines} × {machine.name:<14}({machine.num_gpus} × {machine.gpu}, "
            f"{machine.gpu_bytes >> 30} GiB)  "
        )
        if needed > USABLE * machine.gpu_bytes:
            text += f"does not fit: a card needs {needed / 2**30:.1f} GiB"
        else:
            text += (
                f"{duration(found.update_s):>10} an update {duration(found.run_s):>12} in all  ${found.dollars:,.0f}"
            )
            cards = found.num_machines * machine.num_gpus
            text += f"  uses {used} of its {cards} cards" if used < cards else ""
        lines.append(text)
    lines.append(
        "             assumed: machines up from the first to the last minute, no network wait, scoring in "
        + ("float32" if precision == "fp32" else "TF32")
    )
    return lines


def _flops_text(value: float) -> str:
    for scale, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if value >= scale:
            return f"{value / scale:,.1f} {unit}"
    return f"{value / 1e6:,.1f} MFLOP"
