"""What an update and an evaluation work with, on one rank of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.diffusion.steps import Guidance, StepKernel
from ctrl_ray.distributed.batches import Batch, evaluation_batch, rank_share, training_batch
from ctrl_ray.distributed.engine import PolicyEngine
from ctrl_ray.gradients.rollout import Trajectory, keyed_noise, rollout
from ctrl_ray.policy.protocol import Encoder, Inputs
from ctrl_ray.rewards.protocol import PendingRewards, Rewards


@dataclass(frozen=True)
class Rank:
    """Who this process is in the group."""

    index: int
    size: int
    device: torch.device


@dataclass(frozen=True)
class Learner:
    """Everything that an update or an evaluation needs of one rank."""

    config: TrainConfig
    engine: PolicyEngine
    kernel: StepKernel
    encoder: Encoder
    rewards: Rewards
    controls: Mapping[str, ControlConfig]
    """The policy's, in column order; the config's controls first."""
    prompts: Sequence[str]
    rank: Rank
    evaluation_prompts: Sequence[str] = ()
    """Of the evaluations; none: those of training."""
    pre_trained_log_probs: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    """Control to (m, K): beliefs about samples of the pre-trained model; with them an evaluation has a certificate."""

    @property
    def guidance(self) -> Guidance:
        """Classifier-free guidance of the run."""
        return Guidance.of(self.config.sampler)

    @property
    def num_rewarded(self) -> int:
        """Label columns that the rewards know: the config's controls."""
        return len(self.config.controls)

    def training_batch(self, update: int) -> Batch:
        """This rank's share of what an update asks for."""
        config, rank = self.config, self.rank
        return training_batch(
            config.seed,
            update,
            rank_share(config.global_batch_size, rank.index, rank.size, config.group_size),
            self.prompts,
            self.controls,
            tuple(config.controls),
            config.fixed_control_dropout,
            config.group_size,
            systematic_over=config.global_batch_size if config.label_draws == "systematic" else None,
        )

    def evaluation_batch(self, sample_ids: Sequence[int]) -> Batch:
        """What is asked for in samples of an evaluation, the same in all of them."""
        prompts = self.evaluation_prompts or self.prompts
        return evaluation_batch(sample_ids, prompts, self.controls, tuple(self.config.controls))

    def roll_out(
        self,
        batch: Batch,
        seed: int,
        update: int,
        *,
        with_kl: bool = False,
        with_graphs: bool = False,
        with_means: bool = False,
    ) -> Trajectory:
        """Sample a batch under the policy, its noise keyed by (seed, update, sample id)."""
        return rollout(
            self.engine,
            self.kernel,
            Inputs(self.encoder.encode(batch.prompts), batch.labels.to(self.rank.device), self.guidance),
            keyed_noise(
                seed, update, batch.sample_ids, self.engine.latent_shape, self.kernel.num_steps, self.rank.device
            ),
            with_kl=with_kl,
            with_graphs=with_graphs,
            with_means=with_means,
            latent_reduction=self.config.latent_reduction,
        )

    def submit(self, batch: Batch, latents: Tensor) -> PendingRewards:
        """Ask for the rewards of a batch's clean latents."""
        columns = self.num_rewarded
        return self.rewards.submit(latents, batch.prompts, batch.labels[:, :columns], batch.strengths[:, :columns])
