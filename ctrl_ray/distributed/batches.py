"""Which prompts and labels the samples of an update have: keyed draws, the same on any number of workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl_ray.config import ControlConfig
from ctrl_ray.diffusion.noise import draw_index, draw_uniform


@dataclass(frozen=True)
class Batch:
    """Some samples of one update or evaluation."""

    sample_ids: tuple[int, ...]
    prompts: tuple[str, ...]
    labels: Tensor
    """(B, C) int64 in the policy's column order; num_classes = null."""
    strengths: Tensor
    """(B, C) float32: guidance strength, 0 where the label is null."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def select(self, start: int, stop: int) -> Batch:
        """Samples start … stop − 1."""
        part = slice(start, stop)
        return Batch(self.sample_ids[part], self.prompts[part], self.labels[part], self.strengths[part])


def rank_share(global_batch_size: int, rank: int, num_ranks: int, group_size: int = 1) -> range:
    """Sample ids of one rank: neighbouring ones, as evenly as they divide; all ranks together have each id once.

    group_size: so many neighbours stay together, on one rank; it divides the batch.
    """
    groups = global_batch_size // group_size
    return range(groups * rank // num_ranks * group_size, groups * (rank + 1) // num_ranks * group_size)


def num_rounds(global_batch_size: int, num_ranks: int, micro_batch_size: int, group_size: int = 1) -> int:
    """Micro-batches that every rank runs; one whose share is smaller fills up with padding of no weight."""
    largest = -(-(global_batch_size // group_size) // num_ranks) * group_size
    return -(-largest // micro_batch_size)


def training_batch(
    seed: int,
    update: int,
    sample_ids: Sequence[int],
    prompts: Sequence[str],
    controls: Mapping[str, ControlConfig],
    active: Sequence[str],
    control_dropout: float,
    group_size: int = 1,
    *,
    systematic_over: int | None = None,
) -> Batch:
    """Prompt uniform, each active control's label from its law, null with probability `control_dropout`.

    controls: the policy's, in column order; those not in `active` (kept from an initial adapter) are always null.
    group_size: samples whose ids have the same quotient by it share prompt and labels.
    systematic_over: the update's samples, among whose groups every class then is as often as its probability says, to one;
    None: each group's labels are drawn by themselves.
    """
    groups = [sample_id // group_size for sample_id in sample_ids]
    columns = []
    for name, control in controls.items():
        if name not in active:
            columns.append([control.num_classes] * len(groups))
        elif systematic_over is None:
            columns.append([_label(seed, update, group, name, control, control_dropout) for group in groups])
        else:
            weights = _weights(control)
            shares = [*((1 - control_dropout) * (weight / sum(weights)) for weight in weights), control_dropout]
            labels = _systematic_labels(seed, update, systematic_over // group_size, name, shares)
            columns.append([labels[group] for group in groups])
    uniform = (1.0,) * len(prompts)
    chosen = tuple(prompts[draw_index(seed, update, group, "prompt", uniform)] for group in groups)
    return make_batch(sample_ids, chosen, torch.tensor(columns).T.reshape(len(groups), -1), controls)


def _label(seed: int, update: int, group: int, name: str, control: ControlConfig, dropout: float) -> int:
    if draw_uniform(seed, update, group, f"dropout {name}") < dropout:
        return control.num_classes
    return draw_index(seed, update, group, f"label {name}", _weights(control))


def _weights(control: ControlConfig) -> tuple[float, ...]:
    return control.label_weights or (1.0,) * control.num_classes


def _systematic_labels(seed: int, update: int, num_groups: int, control: str, shares: Sequence[float]) -> list[int]:
    """A label for every group: one point in each of as many equal parts of [0, 1), in an order of its own, through the
    law's distribution function; each label alone follows the law."""
    order = sorted(range(num_groups), key=lambda group: draw_uniform(seed, update, group, f"label order {control}"))
    offset = draw_uniform(seed, update, 0, f"label offset {control}")
    points = (torch.arange(num_groups, dtype=torch.float64) + offset) / num_groups
    borders = torch.tensor(shares, dtype=torch.float64).cumsum(0)[:-1]
    labels = [0] * num_groups
    for group, label in zip(order, torch.bucketize(points, borders, right=True).tolist(), strict=True):
        labels[group] = label
    return labels


def evaluation_batch(
    sample_ids: Sequence[int],
    prompts: Sequence[str],
    controls: Mapping[str, ControlConfig],
    active: Sequence[str],
) -> Batch:
    """Every combination of the active controls' classes equally often, prompts cycling within a class.

    Sample i has class (i mod K) of the combined K classes and prompt ⌊i / K⌋ mod P.
    """
    rows = []
    combinations = 1
    for name in active:
        combinations *= controls[name].num_classes
    for sample_id in sample_ids:
        rest, row = sample_id % combinations, []
        for name, control in controls.items():
            if name in active:
                row.append(rest % control.num_classes)
                rest //= control.num_classes
            else:
                row.append(control.num_classes)
        rows.append(row)
    chosen = tuple(prompts[(sample_id // combinations) % len(prompts)] for sample_id in sample_ids)
    return make_batch(sample_ids, chosen, torch.tensor(rows), controls)


def make_batch(
    sample_ids: Sequence[int], prompts: Sequence[str], labels: Tensor, controls: Mapping[str, ControlConfig]
) -> Batch:
    """Batch with the strengths that belong to the labels."""
    null = torch.tensor([control.num_classes for control in controls.values()])
    gamma = torch.tensor([control.guidance_strength for control in controls.values()])
    strengths = torch.where(labels == null, torch.zeros(()), gamma)
    return Batch(tuple(int(i) for i in sample_ids), tuple(prompts), labels.long(), strengths.float())
