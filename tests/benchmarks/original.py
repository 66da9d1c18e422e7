"""Our update beside the loop that the paper's public code runs: `python -m tests.benchmarks.original`.

The original loop is written anew from a description of it. For each denoising step it calls the denoiser four times, policy
and a deep copy as the reference, with and without the prompt (two without guidance), each call under a checkpoint of its
whole forward; the trajectory of a micro-batch of 4, the VAE and the classifier are one graph, which goes back at once. Its
random truncation is off, and its KL is the sum that ours is, so that all columns have the same gradient; the cosine of each
with the first one's is printed.

    original        as described
    not checkpointed  the same without its checkpoints, at the micro-batch that suits it best
    ours            `CTRL.update` with the estimator `full`, at the micro-batch that suits it best
    ours, graphs kept  the same with `estimator.keep_graphs`

on the same policy, prompts, labels, noise and reward model of `shapes`, in turns, in one process whose rewards are local. A
ratio is the median over the turns of an update's samples per second over those of the better original in the same turn. Peak
bytes are counted in one more update, those of weights left out.

2026-11-29, one thread of an Intel Xeon, another run beside it, batch 32, three turns: samples/s (× the better original):

    steps  guidance   original     not checkpointed   ours         ours, graphs kept
    10     1          1.85 (.26)   6.73               5.06 (.76)   7.28 (1.08)
    10     3           .82 (.23)   3.63               2.43 (.77)   3.63 (1.02)
    20     1           .50 (.24)   2.14               1.42 (.67)   2.01 (.90)

Without its checkpoints the original makes the calls that ours makes, two forwards and two backwards of the denoiser a step. So
no order of them is much faster; what is left is how fast a call is, and convolutions run at 55 of the core's 98 GFLOP/s. Tried
on `shapes`, in pairs:

    graphs kept from the rollout (`estimator.keep_graphs`)        1.4 to 1.5 × as fast; kept where memory is there
    LoRA on the policy's half of one batch with the reference's   1.03 ×; not kept
    weights and latents channels_last                             1.00 to 1.10 ×, mostly 1.03; not kept
    regional torch.compile (`scaling.compile`)                    .98 to 1.10 ×, after minutes; off by default
    threads of worker and actor 1 and 1; 1 and 2; 2 and 1; 2 and 2   1.07; 1.03; .92; .86 s an update; the preset has the last
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctrl_ray.config import AdapterConfig, TrainConfig
from ctrl_ray.diffusion.steps import NO_GUIDANCE, GaussianStep, ModelOutput, gaussian_sample, step_kl
from ctrl_ray.distributed.batches import Batch
from ctrl_ray.distributed.learner import Learner
from ctrl_ray.distributed.update import CTRL
from ctrl_ray.gradients.rollout import keyed_noise
from ctrl_ray.planning.live_bytes import LiveBytes
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import Condition, Inputs
from ctrl_ray.rewards.local import LocalRewards
from ctrl_ray.rewards.model import RewardModel
from ctrl_ray.wording import size_text, text_table
from tests.benchmarks.recipe import (
    PlainEngine,
    as_a_worker,
    make_learner,
    shared_rewards,
    shipped_control,
    this_machine,
    today,
)

_ORIGINAL_MICRO_BATCH = 4


class OriginalLoop:
    """The original loop on a learner's policy; `update` makes one optimizer step, as a `Method`'s does."""

    def __init__(self, *, checkpointed: bool) -> None:
        self._checkpointed = checkpointed
        self._reference: ControlledPolicy | None = None

    def update(self, learner: Learner, update: int) -> None:
        """Micro-batch by micro-batch: roll out with a graph, score, go back."""
        config = learner.config
        if self._reference is None:
            self._reference = copy.deepcopy(_policy(learner))
        batch = learner.training_batch(update)
        size = config.fixed_micro_batch_size
        for start in range(0, config.global_batch_size, size):
            loss = self._loss(learner, batch.select(start, start + size), update)
            learner.engine.backward(loss / config.global_batch_size)
        learner.engine.step(update)

    def _loss(self, learner: Learner, batch: Batch, update: int) -> Tensor:
        """Σ_b kl_coef KL_b − Σ_c γ_c log p_c, with the graph of the whole trajectory."""
        config, kernel = learner.config, learner.kernel
        noise = keyed_noise(config.seed, update, batch.sample_ids, learner.engine.latent_shape, kernel.num_steps)
        inputs = Inputs(learner.encoder.encode(batch.prompts), batch.labels, learner.guidance)
        latents, kl = noise(0), torch.zeros(len(batch))
        for step_index in range(kernel.num_steps):
            if not kernel.controlled(step_index):
                step = self._step(learner, step_index, latents, inputs, reference=True)
            else:
                step, ref = (
                    self._step(learner, step_index, latents, inputs, reference=reference) for reference in (False, True)
                )
                kl = kl + step_kl(step, ref)
            latents = gaussian_sample(step, noise(step_index + 1)) if kernel.std(step_index) > 0 else step.mean
        assert isinstance(learner.rewards, LocalRewards) and isinstance(learner.rewards.model, RewardModel)
        model, reward = learner.rewards.model, torch.zeros(())
        images = model.decoder.decode(latents)
        for column, classifier in enumerate(model.classifiers):
            log_probs = classifier.class_log_probs(images, batch.prompts)  # type: ignore[operator]
            of_asked = log_probs.gather(1, batch.labels[:, column, None])[:, 0]
            reward = reward + (batch.strengths[:, column] * of_asked).sum()
        return config.kl_coef * kl.sum() - reward

    def _step(
        self, learner: Learner, step_index: int, latents: Tensor, inputs: Inputs, *, reference: bool
    ) -> GaussianStep:
        """One or two calls of one branch each."""
        model = self._reference if reference else _policy(learner)
        assert model is not None
        time_of = learner.kernel.time(step_index, latents.device)
        alone = dataclasses.replace(inputs, guidance=NO_GUIDANCE)
        prediction = self._call(model, latents, time_of, alone, reference=reference)
        scale = inputs.guidance.scale
        if scale != 1:
            null = self._call(model, latents, time_of, _unconditional(model, inputs), reference=reference)
            prediction = null + scale * (prediction - null)
        return learner.kernel.step(step_index, latents, ModelOutput(prediction))

    def _call(
        self, model: ControlledPolicy, latents: Tensor, time_of: Tensor, inputs: Inputs, *, reference: bool
    ) -> Tensor:
        def run(latents: Tensor) -> Tensor:
            output: ModelOutput = model(latents, time_of, inputs, reference=reference)
            return output.prediction

        if not self._checkpointed:
            return run(latents)
        found: Tensor = checkpoint(run, latents, use_reentrant=False)
        return found


def _policy(learner: Learner) -> ControlledPolicy:
    policy = learner.engine.policy
    assert isinstance(policy, ControlledPolicy)
    return policy


def _unconditional(model: ControlledPolicy, inputs: Inputs) -> Inputs:
    """Without prompt and without labels."""
    condition = inputs.condition
    assert condition.null_tensors is not None
    null = Condition(condition.prompts, condition.null_tensors, condition.null_tensors)
    return Inputs(null, model.controls.null(len(inputs), inputs.labels.device), NO_GUIDANCE)


class _Noting(PlainEngine):
    """Keeps the gradient of the last update."""

    gradient = torch.zeros(0)

    def step(self, update: int) -> float:
        """As before, the gradient noted first."""
        parameters = self.policy.trainable_parameters().values()
        self.gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double()
        return super().step(update)


@dataclass(frozen=True)
class Column:
    """One loop at one micro-batch size, with a policy of its own."""

    name: str
    micro_batch: int
    learner: Learner
    run: Callable[[Learner, int], object]

    def seconds(self, update: int) -> float:
        """Wall seconds of an update."""
        start = time.perf_counter()
        self.run(self.learner, update)
        return time.perf_counter() - start

    @property
    def gradient(self) -> Tensor:
        """Of the last update, flat."""
        engine = self.learner.engine
        assert isinstance(engine, _Noting)
        return engine.gradient

    def peak(self, update: int) -> int:
        """Bytes beyond the weights, at most, in an update."""
        with LiveBytes() as live:
            for parameter in self.learner.engine.policy.parameters():
                live.add(parameter)
            start = live.restart_peak()
            self.run(self.learner, update)
            return live.peak - start


def columns(config: TrainConfig, rewards: LocalRewards, micro_batches: Sequence[int]) -> list[Column]:
    """The four loops; those with a choice at the micro-batch that was fastest in one update."""

    def made(
        name: str, size: int, make: Callable[[TrainConfig], Callable[[Learner, int], object]], keep: bool
    ) -> Column:
        own = dataclasses.replace(
            config,
            micro_batch_size_per_worker=size,
            estimator=dataclasses.replace(config.estimator, keep_graphs=keep),
        )
        learner = make_learner(own, rewards)
        _perturb(_policy(learner))
        learner = dataclasses.replace(learner, engine=_Noting(_policy(learner), own))  # type: ignore[arg-type]
        return Column(name, size, learner, make(own))

    def best(*asked: object) -> Column:
        found = {}
        for size in micro_batches:
            column = made(asked[0], size, *asked[1:])  # type: ignore[arg-type]
            column.seconds(0)
            found[column.seconds(1)] = size
        return made(asked[0], found[min(found)], *asked[1:])  # type: ignore[arg-type]

    def original(checkpointed: bool) -> Callable[[TrainConfig], Callable[[Learner, int], object]]:
        return lambda _: OriginalLoop(checkpointed=checkpointed).update

    def ours(own: TrainConfig) -> Callable[[Learner, int], object]:
        return CTRL.of(own).update

    return [
        made("original", _ORIGINAL_MICRO_BATCH, original(True), False),
        best("not checkpointed", original(False), False),
        best("ours", ours, False),
        best("ours, graphs kept", ours, True),
    ]


@torch.no_grad()
def _perturb(policy: ControlledPolicy) -> None:
    """The same for every column: away from the start, where there is no KL and half of LoRA has no gradient."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_parameters().values():
        parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    for module in policy.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0


def measure(config: TrainConfig, rewards: LocalRewards, micro_batches: Sequence[int], turns: int) -> list[list[str]]:
    """A row for each column: micro-batch, samples/s, ratio to the better original, peak, cosine."""
    loops = columns(config, rewards, micro_batches)
    for loop in loops:
        loop.seconds(0)  # chooses kernels; all have the same parameters, so the same gradient
    gradients = [loop.gradient for loop in loops]
    took = [[loop.seconds(1 + turn) for loop in _turned(loops, turn)] for turn in range(turns)]
    rows = []
    for index, (loop, gradient) in enumerate(zip(loops, gradients, strict=True)):
        own = [row[(index - turn) % len(loops)] for turn, row in enumerate(took)]
        better = [min(row[-turn % len(loops)], row[(1 - turn) % len(loops)]) for turn, row in enumerate(took)]
        ratio = statistics.median(theirs / ours for theirs, ours in zip(better, own, strict=True))
        cosine = torch.nn.functional.cosine_similarity(gradient, gradients[0], dim=0)
        rows.append(
            [
                loop.name,
                str(loop.micro_batch),
                f"{config.global_batch_size / statistics.median(own):.2f}",
                f"{ratio:.2f}",
                size_text(loop.peak(1 + turns)),
                f"{float(cosine):.6f}",
            ]
        )
    return rows


def _turned(loops: Sequence[Column], turn: int) -> list[Column]:
    """Another one first in each turn."""
    first = turn % len(loops)
    return [*loops[first:], *loops[:first]]


def main(argv: Sequence[str] | None = None) -> int:
    """Print a table for each number of steps and guidance scale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", choices=["embedding", "gains"], default="embedding", help="the paper's, or ours")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--guidance-scales", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--turns", type=int, default=5)
    arguments = parser.parse_args(argv)
    as_a_worker("original")
    torch.set_num_threads(arguments.threads)
    base = dataclasses.replace(
        today(shipped_control(), 0).config,
        global_batch_size=arguments.batch_size,
        control_dropout=0.0,
        adapter=AdapterConfig(kind=arguments.adapter),
    )
    rewards = shared_rewards(base)
    head = ["loop", "micro-batch", "samples/s", "× better original", "peak", "cosine"]
    for steps in arguments.steps:
        for scale in arguments.guidance_scales:
            sampler = dataclasses.replace(base.sampler, num_steps=steps, guidance_scale=scale)
            config = dataclasses.replace(base, sampler=sampler)
            print(f"\n{steps} steps, guidance scale {scale:g}, batch {arguments.batch_size}, {arguments.adapter}")
            print(text_table([head, *measure(config, rewards, arguments.micro_batches, arguments.turns)]), flush=True)
    print(this_machine())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
