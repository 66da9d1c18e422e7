"""One update of CTRL, on one rank of many: roll out, score, adjoint pass, optimizer step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.batches import Batch, num_rounds
from ctrl_ray.distributed.clock import PhaseClock
from ctrl_ray.distributed.engine import all_reduce_sum
from ctrl_ray.distributed.learner import Learner
from ctrl_ray.errors import NonFiniteError
from ctrl_ray.gradients.adjoint import AdjointPlan, AdjointStats, Estimator, TerminalReward, adjoint_pass
from ctrl_ray.gradients.estimators import make_estimator
from ctrl_ray.gradients.rollout import Trajectory
from ctrl_ray.rewards.protocol import PendingRewards, RewardAnswer


@dataclass(frozen=True)
class CTRL:
    """The paper's method: direct back-propagation of γ log p(y|x,c) − kl_coef KL, one optimizer step per rollout.

    A `Method` (`ctrl_ray.distributed.method`). The estimator says how the gradient goes back.
    """

    estimator: Estimator

    @classmethod
    def of(cls, config: TrainConfig) -> CTRL:
        """With the estimator that the config names."""
        return cls(make_estimator(config.estimator, config.sampler.num_steps))

    @property
    def needs_cotangent(self) -> bool:
        """Whether the reward must have a gradient."""
        return self.estimator.needs_cotangent

    def update(self, learner: Learner, update: int) -> dict[str, float]:
        """Roll out, score, adjoint pass, step; returns the update's metrics, the same on every rank.

        The pool scores micro-batch i while i + 1 is rolled out. A global batch that does not divide by the number of ranks
        is shared as evenly as it can be. Raises NonFiniteError where a reward, a loss or a cotangent is not finite.
        """
        config, rank = learner.config, learner.rank
        clock = PhaseClock(rank.device)
        batch = learner.training_batch(update)
        totals = torch.zeros(_NUM_SUMS + 2 * learner.num_rewarded, dtype=torch.float64)
        size = config.fixed_micro_batch_size
        waiting: _Scored | None = None
        for index in range(num_rounds(config.global_batch_size, rank.size, size, config.group_size)):
            part = batch.select(index * size, (index + 1) * size)
            padding = not len(part)
            if padding:
                part = batch.select(0, 1)
            with clock("rollout_s"):
                trajectory = learner.roll_out(
                    *(part, config.seed, update),
                    with_graphs=self.estimator.keep_graphs,
                    with_means=self.estimator.keep_means,
                )
                pending = learner.submit(part, trajectory.clean_latents)
            if waiting is not None:
                totals += self._go_back(learner, waiting, update, clock)
            waiting = _Scored(part, trajectory, pending, index, padding)
        assert waiting is not None
        totals += self._go_back(learner, waiting, update, clock)
        totals = all_reduce_sum(totals, rank.device)
        with clock("backward_s"):
            gradient_norm = learner.engine.step(update)
        return _update_metrics(learner, totals, gradient_norm, clock)

    def _go_back(self, learner: Learner, scored: _Scored, update: int, clock: PhaseClock) -> Tensor:
        """The adjoint pass of one micro-batch; returns its part of the update's sums (see `_sums`)."""
        config, rank = learner.config, learner.rank
        where = f"update {update}, micro-batch {scored.index} on rank {rank.index}"
        with clock("reward_wait_s"):
            answer = scored.pending.result()
        _require_rewards(answer, self.needs_cotangent, where)
        strengths = scored.batch.strengths[:, : learner.num_rewarded].double()
        value = (strengths * answer.log_probs.double().cpu()).sum(1)
        reward = TerminalReward(
            value.to(rank.device), None if answer.cotangent is None else answer.cotangent.to(rank.device)
        )
        plan = self.estimator.plan(learner.kernel.num_steps, config.seed, update, scored.index)
        # the engine averages over ranks, so that Σ over all ranks and micro-batches is 1
        weight = 0.0 if scored.padding else rank.size / config.global_batch_size
        with clock("backward_s"):
            try:
                stats = adjoint_pass(
                    learner.engine,
                    learner.kernel,
                    scored.trajectory,
                    reward,
                    self.estimator,
                    plan,
                    kl_coef=config.kl_coef,
                    sample_weights=torch.full((len(scored.batch),), weight, device=rank.device),
                    backward=learner.engine.backward,
                    latent_reduction=config.latent_reduction,
                    max_drift=drift_bound(config, update),
                    groups=torch.tensor(scored.batch.sample_ids, device=rank.device) // config.group_size,
                )
            except NonFiniteError as error:
                raise NonFiniteError(f"{where}: {error}") from error
        if scored.padding:
            return torch.zeros(_NUM_SUMS + 2 * learner.num_rewarded, dtype=torch.float64)
        return _sums(learner, scored.batch, answer, plan, stats)


def drift_bound(config: TrainConfig, update: int) -> float:
    """The longest drift that a trajectory may ask of a step in an update (from 0); infinite where nothing is bounded."""
    first, last = config.estimator.max_drift, config.estimator.final_max_drift
    if first == 0:
        return math.inf
    return first * ((last or first) / first) ** (update / config.num_updates)


@dataclass(frozen=True)
class _Scored:
    batch: Batch
    trajectory: Trajectory
    pending: PendingRewards
    index: int
    padding: bool
    """It only keeps this rank in step with the others: no weight, no part in the metrics."""


def _require_rewards(answer: RewardAnswer, needs_cotangent: bool, where: str) -> None:
    log_probs = answer.log_probs
    missing = needs_cotangent and answer.cotangent is None
    if missing or not bool(torch.isfinite(log_probs).all()):
        raise NonFiniteError(
            f"{where}: rewards are missing or not finite "
            f"(log-probabilities {log_probs.min():.3g} … {log_probs.max():.3g}); lower "
            "optimizer.learning_rate, or look at the classifier"
        )


_NUM_SUMS = 5
"""Of an update, beside those of each control."""


def _sums(learner: Learner, batch: Batch, answer: RewardAnswer, plan: AdjointPlan, stats: AdjointStats) -> Tensor:
    """(Σ reward, labelled samples, Σ KL labelled, Σ KL null, Σ bounded, per control Σ log p, per control labelled samples)."""
    columns = learner.num_rewarded
    log_probs = answer.log_probs.double().cpu()
    null = torch.tensor([control.num_classes for control in learner.controls.values()])[:columns]
    counted = (batch.labels[:, :columns] != null).double()
    labelled = (counted.sum(1) > 0).double()
    # weighted like the gradient: an unbiased estimate where the plan leaves steps out at random
    kl = (stats.kl_per_step.double().cpu() * torch.tensor(plan.weights, dtype=torch.float64)).nansum(1)
    reward = (batch.strengths[:, :columns].double() * log_probs).sum()
    return torch.cat(
        [
            torch.stack(
                [
                    reward,
                    labelled.sum(),
                    (kl * labelled).sum(),
                    (kl * (1 - labelled)).sum(),
                    stats.bounded.double().sum().cpu(),
                ]
            ),
            (log_probs * counted).sum(0),
            counted.sum(0),
        ]
    )


def _update_metrics(learner: Learner, totals: Tensor, gradient_norm: float, clock: PhaseClock) -> dict[str, float]:
    config, columns, seconds = learner.config, learner.num_rewarded, clock.seconds()
    total = config.global_batch_size
    reward_sum, labelled, kl_labelled, kl_null, bounded = totals[:_NUM_SUMS].tolist()
    log_prob_sums, counts = (part.tolist() for part in totals[_NUM_SUMS:].split(columns))
    metrics = {
        "reward": reward_sum / max(1.0, labelled),
        "kl": kl_labelled / max(1.0, labelled),
        "loss": (-reward_sum + config.kl_coef * (kl_labelled + kl_null)) / total,
        "gradient_norm": gradient_norm,
        "learning_rate": learner.engine.learning_rate,
        **seconds,
        "samples_per_s": total / seconds["update_s"],
    }
    if config.estimator.max_drift:
        metrics["bounded"] = bounded / total
    if total > labelled:
        metrics["kl_null"] = kl_null / (total - labelled)
    for name, value, count in zip(config.controls, log_prob_sums, counts, strict=True):
        if count:
            metrics[f"log_prob/{name}"] = value / count
    return metrics
