"""What many workers cost each other, without the machines: `python -m tests.benchmarks.scaling`.

Workers train a denoiser that waits in the place of computing. How long is the planner's word for Stable Diffusion 1.5 at 512 px
with guidance on one card; latents (4 × 64 × 64), trained elements (3.2 million) and micro-batches (8) are its too, so that
requests, answers, gradients and checkpoints have the size that they have there. Ray Train, DeepSpeed's engine, the reward pool,
the channel to the driver and the checkpoints are the real ones. A trajectory has 10 steps in the place of 50, and scoring a
micro-batch waits a fifth of its time, so that the pool is asked as often, for its speed, as in a run.

    workers      seconds of an update over the number of workers; efficiency is one worker's over those of so many
    actors       the same over the number of reward actors
    dispatcher   requests a second that one dispatcher passes on, asked by several processes at once, answers made at once; and
                 how many it could with a core of its own: one over its process's CPU seconds a request

2026-11-29, two cores of an AMD EPYC, two actors, medians of two updates:

    workers                       1       2       4       8       16
    an update of 10 steps / s     7.81    7.85    7.96    8.27    9.88
    efficiency                            .995    .981    .945    .790
    an update of 50 steps / s     40.49                           44.76
    efficiency                                                    .904

As many steps as a real trajectory has are the fair number: the sum of gradients and the update come once. A checkpoint took
.5, 1.3, 3.7, 11.0 and 31.7 s with 1 to 16 workers, while every tensor was summed for itself; with 64 MB at a time it is lost in
the noise of an update with 16. Four workers take 7.93, 8.00, 8.00 and 8.44 s an update with 1, 2, 4 and 8 actors. One
dispatcher passes on 174, 190, 213 and 240 requests a second of 1, 2, 4 and 8 processes (326 to 367 for each of its CPU
seconds); the 128 workers that it serves ask for 7.

What is not here: the network between machines. Gradients and requests go over loopback, and all processes share this
machine's cores, which real workers do not; CPU seconds an update say how much of that is ours.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import ray
import torch
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn

from ctrl_ray.cluster.connection import connected
from ctrl_ray.comparison.estimate import STABLE_DIFFUSION
from ctrl_ray.config import (
    ControlConfig,
    EvaluationConfig,
    LoraConfig,
    RewardPoolConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.distributed import launch
from ctrl_ray.distributed.launch import run_training
from ctrl_ray.distributed.rows import Row, UpdateDone
from ctrl_ray.distributed.worker import TrainJob, train_worker
from ctrl_ray.distributed.worker_group import new_channel
from ctrl_ray.planning.cost import AWS_MACHINES, GPU_UTILISATION
from ctrl_ray.policy.adapter_info import AdapterInfo
from ctrl_ray.policy.backbones.base import Row as LayerRow
from ctrl_ray.policy.backbones.stable_diffusion import StableDiffusion
from ctrl_ray.policy.protocol import Condition
from ctrl_ray.rewards.client import PooledRewards
from ctrl_ray.rewards.pool import WORKERS_A_DISPATCHER, start_reward_pool
from ctrl_ray.rewards.protocol import RewardAnswer
from ctrl_ray.rewards.spec import RewardModelSpec
from ctrl_ray.wording import text_table
from tests.benchmarks.recipe import this_machine
from tests.gpu.sd_shaped import write_sd_shaped

MICRO_BATCH, REAL_STEPS = 8, 50
_LAYERS, _WIDTH, _RANK = 128, 98, 128
"""2 · 98 · 128 trained elements a layer, 3.2 million in all; nothing is computed with them."""
_LATENTS = (4, 64, 64)
_CONTROLS = {"size": ControlConfig(classes=("a", "b", "c", "d"))}


@dataclass(frozen=True)
class Card:
    """Seconds that one card takes for a micro-batch."""

    forward: float
    """Of the denoiser, all guidance branches."""
    backward: float
    score: float
    """Decode, classify and go back."""
    num_steps: int
    """Of a trajectory."""

    @classmethod
    def named(cls, name: str, num_steps: int) -> Card:
        """By the operations of Stable Diffusion 1.5 and the rate that the planner takes for a card of that name."""
        machine = next(machine for machine in AWS_MACHINES if machine.gpu == name)
        rows, decodes = 2 * MICRO_BATCH, 2 * MICRO_BATCH  # a decode's gradient takes as much again
        denoiser = GPU_UTILISATION * machine.flops("bf16")
        return cls(
            forward=rows * STABLE_DIFFUSION.forward / denoiser,
            backward=rows * STABLE_DIFFUSION.backward / denoiser,
            score=decodes
            * STABLE_DIFFUSION.decode
            / (GPU_UTILISATION * machine.flops("tf32"))
            * num_steps
            / REAL_STEPS,
            num_steps=num_steps,
        )

    def update(self, micro_batches: int) -> float:
        """Seconds of an update of `full` whose scoring is hidden but for the last micro-batch's."""
        steps = self.num_steps - 1
        return (
            micro_batches * ((self.num_steps + 2 * steps + 1) * self.forward + (2 * steps + 1) * self.backward)
            + self.score
        )


class _Waits(torch.autograd.Function):
    """The denoiser's call: takes its time forward and back; every trained tensor gets a gradient of its size."""

    @staticmethod
    def forward(ctx: Any, latents: Tensor, card: Card, *parameters: Tensor) -> Tensor:
        ctx.card = card
        ctx.save_for_backward(*parameters)
        time.sleep(card.forward)
        return latents * 0.5

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        time.sleep(ctx.card.backward)
        return gradients[0] * 0.5, None, *(torch.full_like(each, 1e-6) for each in ctx.saved_tensors)


class WaitingDenoiser(nn.Module, PeftAdapterMixin):
    """Layers that LoRA is put on, and that are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleDict(
            {f"block_{i}": nn.ModuleDict({"to_q": nn.Linear(_WIDTH, _WIDTH)}) for i in range(_LAYERS)}
        )
        self.time_embedding = nn.Linear(1, 8)


class WaitingBackbone(StableDiffusion):
    """A folder's configurations, a denoiser that waits, prompts that say nothing."""

    card = Card(0, 0, 0, 0)
    latent_shape = _LATENTS

    def load_denoiser(self, dtype: torch.dtype = torch.float32, *, empty: bool = False) -> nn.Module:
        """See `Backbone`."""
        return WaitingDenoiser().eval().requires_grad_(False)

    def load_encoder(self, device: str | torch.device = "cpu") -> Any:
        """See `Backbone`."""
        return _NoText()

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Waits; trained tensors are in the graph."""
        found: Tensor = _Waits.apply(latents, self.card, *(p for p in denoiser.parameters() if p.requires_grad))
        return found

    def output_layers(self, denoiser: nn.Module) -> Sequence[nn.Module]:
        """None."""
        return ()

    def embedding_point(self, denoiser: nn.Module) -> tuple[nn.Module, int]:
        """A layer that nobody calls."""
        module: Any = denoiser.get_submodule("time_embedding")
        return module, 8

    def adapted_layers(self, denoiser: nn.Module) -> dict[str, LayerRow]:
        """All blocks."""
        return {name: "token" for name, layer in denoiser.named_modules() if name.endswith("to_q")}


class _NoText:
    def only(self, prompts: Sequence[str]) -> _NoText:
        return self

    def encode(self, prompts: Sequence[str]) -> Condition:
        text = {"text": torch.zeros(len(prompts), 1, 1)}
        return Condition(tuple(prompts), text, text)


class WaitingRewards:
    """In the place of decoder and classifiers."""

    chunk_size = MICRO_BATCH
    controls = {name: control.num_classes for name, control in _CONTROLS.items()}  # noqa: RUF012

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def to(self, device: str) -> WaitingRewards:
        """It has no tensors."""
        return self

    def evaluate(self, latents: Tensor, prompts: Sequence[str], labels: Tensor, weights: Tensor) -> RewardAnswer:
        """`seconds` for each MICRO_BATCH samples."""
        time.sleep(self.seconds * len(latents) / MICRO_BATCH)
        return RewardAnswer(torch.zeros(labels.shape), latents * 1e-3)

    def class_log_probs(self, inputs: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """At once."""
        return {name: torch.full((len(inputs), count), -1.0) for name, count in self.controls.items()}

    def decode(self, latents: Tensor) -> Tensor:
        """Black images, at once."""
        return torch.zeros(len(latents), 8, 8, 3, dtype=torch.uint8)


def waiting_worker(card: Card, job: TrainJob) -> None:
    """`train_worker` on a card that is not there."""

    def load(folder: str, revision: str | None = None, sampler: SamplerConfig | None = None) -> WaitingBackbone:
        backbone = WaitingBackbone(folder)
        backbone.card = card
        return backbone

    def no_floor(learner: Any, progress: dict[str, Any]) -> None:
        progress |= {"precision": job.config.scaling.precision, "kl_noise_floor": 0.0}

    with (
        mock.patch("ctrl_ray.distributed.worker.load_backbone", load),
        mock.patch("ctrl_ray.policy.build.load_backbone", load),
        mock.patch("ctrl_ray.distributed.worker.add_noise_floor", no_floor),
    ):
        train_worker(job)


def measured_updates(folder: Path, card: Card, num_workers: int, num_actors: int, num_updates: int) -> dict[str, float]:
    """Medians of the updates after the first; 'checkpoint_s' is what the one update costs more that is followed by one."""
    config = TrainConfig(
        base_model=str(write_sd_shaped(folder / "pipeline", tiny=True)),
        controls=_CONTROLS,
        global_batch_size=2 * MICRO_BATCH * num_workers,
        micro_batch_size_per_worker=MICRO_BATCH,
        num_updates=num_updates,
        checkpoint_every_updates=num_updates - 1,
        lora=LoraConfig(rank=_RANK, alpha=_RANK, target_modules=("to_q",)),
        sampler=SamplerConfig(num_steps=card.num_steps, guidance_scale=7.5, reference_steps=1),
        rewards=RewardPoolConfig(num_actors=num_actors, cpus_per_actor=0.01, threads_per_actor=1),
        scaling=ScalingConfig(num_workers=num_workers, cpus_per_worker=0.01, threads_per_worker=1),
        evaluation=EvaluationConfig(every_updates=0, num_samples=1, batch_size=1),
        tracker="none",
    )
    backbone = WaitingBackbone(config.base_model)
    info = AdapterInfo(
        base_model=config.base_model,
        base_revision=None,
        controls=_CONTROLS,
        sampler=config.sampler,
        scheduler=backbone.scheduler_config(),
        lora=config.lora,
    )
    rows: list[tuple[float, UpdateDone]] = []

    def note(row: Row) -> None:
        if isinstance(row, UpdateDone):
            rows.append((row.time or 0.0, row))

    model: Any = WaitingRewards(card.score)
    spec = RewardModelSpec(base_model=config.base_model, classifiers={})
    with (
        start_reward_pool(spec, config.rewards, model=model) as pool,
        mock.patch.object(launch, "train_worker", functools.partial(waiting_worker, card)),
    ):
        job = TrainJob(
            config=config,
            controls=_CONTROLS,
            prompts=("a", "b"),
            rewards=pool.client(),
            info=info,
            channel=new_channel(),
        )
        run_training(job, str(folder), "run", note)
    names = ("update_s", "rollout_s", "reward_wait_s", "backward_s")
    found = {name: statistics.median(row.metrics[name] for _, row in rows[1:]) for name in names}
    gaps = [later - earlier for (earlier, _), (later, _) in zip(rows, rows[1:], strict=False)]
    return {**found, "checkpoint_s": gaps[-1] - statistics.median(gaps[:-1])}


@ray.remote(num_cpus=0.01)
def _ask(client: PooledRewards, seconds: float) -> tuple[int, float]:
    """Ask as fast as answers come; (requests answered, seconds)."""
    latents = torch.zeros(MICRO_BATCH, *_LATENTS)
    labels, weights = torch.zeros(MICRO_BATCH, 1, dtype=torch.long), torch.ones(MICRO_BATCH, 1)
    mine, waiting, answered = client.for_worker(0), [], 0
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        waiting.append(mine.submit(latents, ("a",) * MICRO_BATCH, labels, weights))
        if len(waiting) == 4:
            waiting.pop(0).result()
            answered += 1
    took = time.monotonic() - start
    for pending in waiting:
        pending.result()
    return answered, took


def dispatcher_rate(num_askers: int, num_actors: int, seconds: float) -> tuple[float, float]:
    """Requests a second of all askers together, answers made at once; and how many a whole core of the dispatcher makes."""
    config = RewardPoolConfig(num_actors=num_actors, cpus_per_actor=0.01, threads_per_actor=1)
    model: Any = WaitingRewards(0.0)
    with start_reward_pool(RewardModelSpec(base_model="", classifiers={}), config, model=model) as pool:
        ray.get([_ask.remote(pool.client(), 1.0) for _ in range(num_askers)])  # starts their processes
        (process,) = _dispatchers()
        before, asked = sum(process.cpu_times()[:2]), pool.stats().requests
        found = ray.get([_ask.remote(pool.client(), seconds) for _ in range(num_askers)])
        busy, answers = sum(process.cpu_times()[:2]) - before, pool.stats().requests - asked
    return sum(answered / took for answered, took in found), answers / busy


def _dispatchers() -> list[psutil.Process]:
    """Of this session's pools, on this machine."""
    below = [child for process in psutil.process_iter() if process.name() == "raylet" for child in process.children()]
    return [process for process in below if "RewardDispatcher" in " ".join(process.cmdline())]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the three tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--actors", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--askers", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--card", default="H100", help="of those that the planner knows")
    parser.add_argument("--steps", type=int, default=10, help=f"of a trajectory; a real one has {REAL_STEPS}")
    parser.add_argument("--updates", type=int, default=5)
    arguments = parser.parse_args(argv)
    if arguments.updates < 3:
        parser.error("--updates: 3 at least, the time of a checkpoint is told from those of the others")
    card = Card.named(arguments.card, arguments.steps)
    print(
        f"{arguments.card}: forward {card.forward:.4f} s, backward {card.backward:.4f} s, scoring {card.score:.4f} s; an "
        f"update of two micro-batches {card.update(2):.2f} s"
    )
    with connected(2), tempfile.TemporaryDirectory(prefix="ctrl_ray_scaling_") as place:

        def table(settings: Sequence[tuple[int, int]]) -> str:
            rows = [["workers", "actors", "update / s", "efficiency", "rollout", "waiting", "backward", "a checkpoint"]]
            first = 0.0
            for workers, actors in settings:
                folder = Path(tempfile.mkdtemp(dir=place))
                found = measured_updates(folder, card, workers, actors, arguments.updates)
                first = first or found["update_s"]
                cells = (found[name] for name in ("rollout_s", "reward_wait_s", "backward_s", "checkpoint_s"))
                efficiency = first / found["update_s"]
                rows.append(
                    [
                        str(workers),
                        str(actors),
                        f"{found['update_s']:.2f}",
                        f"{efficiency:.3f}",
                        *(f"{x:.2f}" for x in cells),
                    ]
                )
                print("  ".join(rows[-1]), flush=True)
            return text_table(rows)

        if arguments.workers:
            print(table([(workers, 2) for workers in arguments.workers]), flush=True)
        if arguments.actors:
            print(table([(4, actors) for actors in arguments.actors]), flush=True)
        for askers in arguments.askers:
            rate, of_a_core = dispatcher_rate(askers, 2, 10.0)
            needed = WORKERS_A_DISPATCHER * 2 / card.update(2) * card.num_steps / REAL_STEPS
            print(
                f"{askers} askers: {rate:.0f} requests/s, {of_a_core:.0f} a core of the dispatcher; its "
                f"{WORKERS_A_DISPATCHER} workers ask for {needed:.1f}",
                flush=True,
            )
    print(this_machine())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
