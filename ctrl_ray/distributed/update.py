"""One update and one evaluation of a policy, on one rank of many."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.diffusion.steps import GaussianStep, Guidance, StepKernel, step_kl
from ctrl_ray.distributed.batches import Batch, evaluation_batch, num_rounds, rank_share, training_batch
from ctrl_ray.distributed.engine import PolicyEngine, all_reduce_sum
from ctrl_ray.errors import NonFiniteError
from ctrl_ray.gradients.adjoint import TerminalReward, adjoint_pass
from ctrl_ray.gradients.estimators import Estimator
from ctrl_ray.gradients.rollout import Trajectory, keyed_noise, policy_step, rollout
from ctrl_ray.oracles import load_oracle, measure
from ctrl_ray.policy.protocol import Encoder
from ctrl_ray.rewards.protocol import PendingRewards, Rewards


@dataclass(frozen=True)
class Rank:
    """Who this process is in the group."""

    index: int
    size: int
    device: torch.device


@dataclass(frozen=True)
class Learner:
    """Everything an update needs."""

    config: TrainConfig
    engine: PolicyEngine
    kernel: StepKernel
    encoder: Encoder
    rewards: Rewards
    estimator: Estimator
    controls: Mapping[str, ControlConfig]
    """The policy's, in column order; the config's controls first."""
    prompts: Sequence[str]
    rank: Rank

    @property
    def guidance(self) -> Guidance:
        """Classifier-free guidance of the run."""
        return Guidance(self.config.sampler.guidance_scale, self.config.sampler.control_scale)

    @property
    def num_rewarded(self) -> int:
        """Label columns that the rewards know: the config's controls."""
        return len(self.config.controls)

    def roll_out(self, batch: Batch, seed: int, update: int, *, with_kl: bool = False) -> Trajectory:
        """Sample a batch under the policy, its noise keyed by (seed, update, sample id)."""
        return rollout(
            self.engine,
            self.kernel,
            self.encoder.encode(batch.prompts),
            batch.labels.to(self.rank.device),
            self.guidance,
            keyed_noise(
                seed, update, batch.sample_ids, self.engine.latent_shape, self.kernel.num_steps, self.rank.device
            ),
            with_kl=with_kl,
            latent_reduction=self.config.latent_reduction,
        )


@dataclass(frozen=True)
class _Scored:
    batch: Batch
    trajectory: Trajectory
    pending: PendingRewards
    index: int
    padding: bool
    """It only keeps this rank in step with the others: no weight, no figures."""


def train_update(learner: Learner, update: int) -> dict[str, float]:
    """Roll out, score, sweep, step; returns the update's metrics, the same on every rank.

    The pool scores micro-batch i while i + 1 is rolled out. A global batch that does not divide by the number of ranks
    is shared as evenly as it can be. Raises NonFiniteError before the optimizer step.
    """
    config, rank = learner.config, learner.rank
    clock = _Clock()
    batch = training_batch(
        config.seed,
        update,
        rank_share(config.global_batch_size, rank.index, rank.size),
        learner.prompts,
        learner.controls,
        tuple(config.controls),
        config.control_dropout,
        config.group_size,
    )
    totals = torch.zeros(4 + 2 * learner.num_rewarded, dtype=torch.float64)
    size = config.micro_batch_size_per_worker
    waiting: _Scored | None = None
    for index in range(num_rounds(config.global_batch_size, rank.size, size)):
        part = batch.select(index * size, (index + 1) * size)
        padding = not len(part)
        if padding:
            part = batch.select(0, 1)
        with clock("rollout_s"):
            trajectory = learner.roll_out(part, config.seed, update)
            scored = _Scored(part, trajectory, _submit(learner, part, trajectory.clean_latents), index, padding)
        if waiting is not None:
            totals += _sweep(learner, waiting, update, clock)
        waiting = scored
    assert waiting is not None
    totals += _sweep(learner, waiting, update, clock)
    totals = all_reduce_sum(totals)
    with clock("backward_s"):
        gradient_norm = learner.engine.step(update)
    return _update_metrics(learner, totals, gradient_norm, clock)


def _submit(learner: Learner, batch: Batch, latents: Tensor) -> PendingRewards:
    columns = learner.num_rewarded
    return learner.rewards.submit(latents, batch.prompts, batch.labels[:, :columns], batch.strengths[:, :columns])


def _sweep(learner: Learner, scored: _Scored, update: int, clock: _Clock) -> Tensor:
    """Sweep one micro-batch; returns (Σ reward, labelled samples, Σ KL labelled, Σ KL null, per control Σ log p, n)."""
    config, batch, rank = learner.config, scored.batch, learner.rank
    with clock("reward_wait_s"):
        rewarded = scored.pending.result()
    log_probs = rewarded.log_probs.double().cpu()
    missing = learner.estimator.needs_cotangent and rewarded.cotangent is None
    if missing or not bool(torch.isfinite(log_probs).all()):
        raise NonFiniteError(
            f"update {update}, micro-batch {scored.index} on rank {rank.index}: rewards are missing or not finite "
            f"(log-probabilities {log_probs.min():.3g} … {log_probs.max():.3g}); look at the classifier"
        )
    columns = learner.num_rewarded
    strengths = batch.strengths[:, :columns].double()
    reward = TerminalReward(
        (strengths * log_probs).sum(1).to(rank.device),
        None if rewarded.cotangent is None else rewarded.cotangent.to(rank.device),
    )
    plan = learner.estimator.plan(learner.kernel.num_steps, config.seed, update, scored.index)
    groups = torch.tensor(batch.sample_ids, device=rank.device) // config.group_size
    with clock("backward_s"):
        try:
            stats = adjoint_pass(
                learner.engine,
                learner.kernel,
                scored.trajectory,
                reward,
                plan,
                kl_coef=config.kl_coef,
                # the engine averages over ranks, so that Σ over all ranks and micro-batches is 1
                sample_weights=torch.full(
                    (len(batch),), 0.0 if scored.padding else rank.size / config.global_batch_size, device=rank.device
                ),
                backward=learner.engine.backward,
                latent_reduction=config.latent_reduction,
                groups=groups,
            )
        except NonFiniteError as error:
            message = f"update {update}, micro-batch {scored.index} on rank {rank.index}: {error}"
            raise NonFiniteError(message) from error
    if scored.padding:
        return torch.zeros(4 + 2 * columns, dtype=torch.float64)
    counted = (batch.labels[:, :columns] != _null(learner)[:columns]).double()
    labelled = (counted.sum(1) > 0).double()
    # weighted like the gradient: an unbiased estimate where the plan leaves steps out at random
    kl = (stats.kl_per_step.double().cpu() * torch.tensor(plan.weights, dtype=torch.float64)).nansum(1)
    return torch.cat(
        [
            torch.stack(
                [
                    (strengths * log_probs).sum(),
                    labelled.sum(),
                    (kl * labelled).sum(),
                    (kl * (1 - labelled)).sum(),
                ]
            ),
            (log_probs * counted).sum(0),
            counted.sum(0),
        ]
    )


def _null(learner: Learner) -> Tensor:
    return torch.tensor([control.num_classes for control in learner.controls.values()])


def _update_metrics(learner: Learner, totals: Tensor, gradient_norm: float, clock: _Clock) -> dict[str, float]:
    config, columns = learner.config, learner.num_rewarded
    total = config.global_batch_size
    reward_sum, labelled, kl_labelled, kl_null = totals[:4].tolist()
    log_prob_sums, counts = totals[4 : 4 + columns].tolist(), totals[4 + columns :].tolist()
    metrics = {
        "reward": reward_sum / max(1.0, labelled),
        "kl": kl_labelled / max(1.0, labelled),
        "loss": (-reward_sum + config.kl_coef * (kl_labelled + kl_null)) / total,
        "gradient_norm": gradient_norm,
        "learning_rate": learner.engine.learning_rate,
        "update_s": clock.total_s(),
        "samples_per_s": total / clock.total_s(),
        **clock.seconds,
    }
    if total > labelled:
        metrics["kl_null"] = kl_null / (total - labelled)
    for name, value, count in zip(config.controls, log_prob_sums, counts, strict=True):
        if count:
            metrics[f"log_prob/{name}"] = value / count
    return metrics


def evaluate_policy(
    learner: Learner, num_samples: int, on_samples: Callable[[Batch, np.ndarray], None] | None = None
) -> dict[str, float]:
    """Accuracy by the oracles on decoded samples, and KL, over all ranks; the noise is the same every time.

    A control without an oracle is judged by its classifier, under 'believed_accuracy' only. on_samples sees this
    rank's batches with their uint8 images (B, H, W, 3).
    """
    config, rank = learner.config, learner.rank
    active = tuple(config.controls)
    confusions = [torch.zeros(c.num_classes, c.num_classes, dtype=torch.float64) for c in config.controls.values()]
    totals = torch.zeros(2 + len(active), dtype=torch.float64)
    mine = list(range(rank.index, num_samples, rank.size))
    rounds = num_rounds(num_samples, rank.size, config.evaluation.batch_size)
    size = math.ceil(math.ceil(num_samples / rank.size) / rounds)
    for index in range(rounds):  # the same number of forwards on every rank, padded by a repeated sample
        ids = mine[index * size : (index + 1) * size]
        batch = evaluation_batch(ids or [0], learner.prompts, learner.controls, active)
        trajectory = learner.roll_out(batch, config.evaluation.seed, 0, with_kl=True)
        if not ids:
            continue
        assert trajectory.kl_per_step is not None
        totals[0] += len(ids)
        totals[1] += trajectory.kl_per_step.double().sum().cpu()
        images = learner.rewards.decode(trajectory.clean_latents).numpy()
        if on_samples is not None:
            on_samples(batch, images)
        believed = _submit(learner, batch, trajectory.clean_latents).result().log_probs
        for column, control in enumerate(config.controls.values()):
            totals[2 + column] += believed[:, column].double().sum()
            if control.oracle:
                measured = measured_classes(control, images)
                for asked, got in zip(batch.labels[:, column].tolist(), measured, strict=True):
                    confusions[column][asked, got] += 1
    totals = all_reduce_sum(totals)
    metrics = {"kl": float(totals[1] / totals[0]), "num_samples": float(totals[0])}
    accuracies = []
    for column, (name, control) in enumerate(config.controls.items()):
        metrics[f"log_prob/{name}"] = float(totals[2 + column] / totals[0])
        if control.oracle:
            confusion = all_reduce_sum(confusions[column])
            metrics[f"accuracy/{name}"] = float(confusion.trace() / confusion.sum())
            metrics[f"macro_f1/{name}"] = _macro_f1(confusion)
            accuracies.append(metrics[f"accuracy/{name}"])
    if accuracies:
        metrics["accuracy"] = float(np.mean(accuracies))
        metrics["macro_f1"] = float(np.mean([metrics[f"macro_f1/{n}"] for n, c in config.controls.items() if c.oracle]))
    return metrics


def kl_noise_floor(learner: Learner) -> float:
    """KL in nats per trajectory that precision alone makes: the reference against itself in batches of another size."""
    batch = evaluation_batch(range(8), learner.prompts, learner.controls, tuple(learner.config.controls))
    trajectory = learner.roll_out(batch, learner.config.evaluation.seed, 0)
    total = 0.0
    for step_index in range(learner.kernel.num_steps):
        if not learner.kernel.controlled(step_index):
            continue
        whole = _reference_step(learner, trajectory, step_index, slice(0, 8))
        for half in (slice(0, 3), slice(3, 8)):
            part = _reference_step(learner, trajectory, step_index, half)
            total += float(step_kl(GaussianStep(whole.mean[half], whole.std), part).sum())
    return total / 8


@torch.no_grad()
def _reference_step(learner: Learner, trajectory: Trajectory, step_index: int, rows: slice) -> GaussianStep:
    condition = trajectory.condition.select(range(len(trajectory.condition))[rows])
    return policy_step(
        learner.engine,
        learner.kernel,
        step_index,
        trajectory.latents[step_index][rows],
        condition,
        trajectory.labels[rows],
        trajectory.guidance,
        reference=True,
    )


def measured_classes(control: ControlConfig, images: np.ndarray) -> list[int]:
    """Class of each uint8 image (N, H, W, 3) by the control's oracle."""
    assert control.oracle is not None
    return [control.classify(value) for value in measure(load_oracle(control.oracle), images)]


def _macro_f1(confusion: Tensor) -> float:
    """Mean F1 over classes; rows: asked, columns: measured."""
    hits = confusion.diagonal()
    return float((2 * hits / (confusion.sum(0) + confusion.sum(1)).clamp_min(1)).mean())


class _Clock:
    """Seconds by phase."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {"rollout_s": 0.0, "reward_wait_s": 0.0, "backward_s": 0.0}

    def __call__(self, phase: str) -> Any:
        return _Phase(self.seconds, phase)

    def total_s(self) -> float:
        return time.perf_counter() - self._start


class _Phase:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] += time.perf_counter() - self._start
