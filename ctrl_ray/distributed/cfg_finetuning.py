"""One update of the baseline CFG fine-tuning, on one rank of many: images and labels in, a denoising loss, optimizer step."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from ctrl_ray.baselines.cfg_finetuning import DenoisingBatch, denoising_loss, draw_batch
from ctrl_ray.baselines.labelled import LabelledLatents, read_labelled
from ctrl_ray.baselines.noising import NoiseSchedule
from ctrl_ray.distributed.batches import num_rounds, rank_share
from ctrl_ray.distributed.clock import PhaseClock
from ctrl_ray.distributed.engine import all_reduce_sum
from ctrl_ray.distributed.learner import Learner
from ctrl_ray.errors import NonFiniteError
from ctrl_ray.offline.reading import OnBadRow


class CFGFineTuning:
    """A `Method` (`ctrl_ray.distributed.method`): the loss of `ctrl_ray.baselines.cfg_finetuning` on stage 1's labelled images.

    All images count, also those that stage 1 holds out. Each rank reads and encodes them at its first update.
    """

    needs_cotangent = False

    def __init__(self, images: LabelledLatents | None = None, on_bad_row: OnBadRow = "error") -> None:
        """images: to train on; None: those of the data set. on_bad_row: 'error', or 'skip' to set bad rows of it aside."""
        self._images, self._on_bad_row = images, on_bad_row
        self._schedule: NoiseSchedule | None = None

    def update(self, learner: Learner, update: int) -> dict[str, float]:
        """One optimizer step on `global_batch_size` images; returns its metrics, the same on every rank.

        Raises NonFiniteError where a loss is not finite, and what `read_labelled` raises.
        """
        images, schedule = self._loaded(learner)
        config, rank = learner.config, learner.rank
        clock = PhaseClock(rank.device)
        size, total = config.fixed_micro_batch_size, torch.zeros(1, dtype=torch.float64)
        mine = rank_share(config.global_batch_size, rank.index, rank.size)
        for index in range(num_rounds(config.global_batch_size, rank.size, size)):
            part = mine[index * size : (index + 1) * size]
            # a rank whose share is smaller keeps in step with the others; the engine averages over ranks
            weight = rank.size / config.global_batch_size if part else 0.0
            drawn = draw_batch(
                images,
                len(schedule),
                config.fixed_control_dropout,
                seed=config.seed,
                update=update,
                sample_ids=part or mine[:1],
            )
            batch = _with_other_controls(drawn, learner).to(rank.device)
            with clock("backward_s"):
                losses = denoising_loss(learner.engine, schedule, batch, learner.encoder.encode(batch.prompts))
                _require_finite(losses, f"update {update}, micro-batch {index} on rank {rank.index}")
                learner.engine.backward(weight * losses.sum())
            if part:
                total += losses.detach().double().sum().cpu()
        total = all_reduce_sum(total, rank.device)
        with clock("backward_s"):
            gradient_norm = learner.engine.step(update)
        seconds = clock.seconds()
        return {
            "denoising_loss": float(total) / config.global_batch_size,
            "gradient_norm": gradient_norm,
            "learning_rate": learner.engine.learning_rate,
            **seconds,
            "samples_per_s": config.global_batch_size / seconds["update_s"],
        }

    def _loaded(self, learner: Learner) -> tuple[LabelledLatents, NoiseSchedule]:
        config, rank = learner.config, learner.rank
        if self._schedule is None:
            self._schedule = NoiseSchedule.of(config)
        if self._images is None:
            say = _say if rank.index == 0 else _say_nothing
            with tempfile.TemporaryDirectory() as folder:
                # the first rank tells of the bad rows, beside the data set; all find the same ones
                bad_rows_file = None if rank.index == 0 else str(Path(folder) / "bad_rows.jsonl")
                self._images = read_labelled(
                    config, device=rank.device, on_bad_row=self._on_bad_row, bad_rows_file=bad_rows_file, say=say
                )
            say(f"{len(self._images)} labelled images encoded")
        return self._images, self._schedule


def _with_other_controls(batch: DenoisingBatch, learner: Learner) -> DenoisingBatch:
    """With columns for the controls that only an initial adapter has: they are always null."""
    null = [control.num_classes for control in learner.controls.values()][batch.labels.shape[1] :]
    columns = torch.tensor(null, dtype=torch.int64).expand(len(batch.labels), len(null))
    return dataclasses.replace(batch, labels=torch.cat([batch.labels, columns], dim=1))


def _require_finite(losses: Tensor, where: str) -> None:
    if not bool(torch.isfinite(losses).all()):
        raise NonFiniteError(
            f"{where}: the denoising loss is not finite; lower optimizer.learning_rate, or use scaling.precision fp32"
        )


def _say(line: str) -> None:
    print(line, flush=True)


def _say_nothing(line: str) -> None:
    """What ranks other than 0 say."""
