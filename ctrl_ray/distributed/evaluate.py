"""One evaluation of a policy during training, on one rank of many."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from ctrl_ray.distributed.batches import Batch, num_rounds
from ctrl_ray.distributed.engine import all_reduce_sum
from ctrl_ray.distributed.learner import Learner
from ctrl_ray.evaluation.certificate import certificate_row, certify_labels
from ctrl_ray.evaluation.judging import oracle_labels
from ctrl_ray.evaluation.metrics import accuracy_of, confusion_matrix, macro_f1_of


def evaluate_policy(
    learner: Learner, num_samples: int, on_samples: Callable[[Batch, np.ndarray], None] | None = None
) -> dict[str, float]:
    """Accuracy by the oracles on decoded samples, KL and the certificate, over all ranks; the noise is the same every time.

    A control without an oracle has no accuracy. on_samples sees this rank's batches with their uint8 images (B, H, W, 3).
    """
    config, rank = learner.config, learner.rank
    active = tuple(config.controls)
    confusions = [torch.zeros(c.num_classes, c.num_classes, dtype=torch.float64) for c in config.controls.values()]
    # A row for each sample, filled by the rank that drew it: KL, log-ratio, log p of each control's class asked for.
    paths = torch.zeros(num_samples, 2 + len(active), dtype=torch.float64)
    mine = list(range(rank.index, num_samples, rank.size))
    rounds = num_rounds(num_samples, rank.size, config.evaluation.fixed_batch_size)
    size = math.ceil(math.ceil(num_samples / rank.size) / rounds)
    for index in range(rounds):  # the same number of forwards on every rank, padded by a repeated sample
        ids = mine[index * size : (index + 1) * size]
        batch = learner.evaluation_batch(ids or [0])
        trajectory = learner.roll_out(batch, config.evaluation.seed, 0, with_kl=True)
        if not ids:
            continue
        assert trajectory.kl_per_step is not None and trajectory.log_ratio is not None
        paths[ids, 0] = trajectory.kl_per_step.double().sum(1).cpu()
        paths[ids, 1] = trajectory.log_ratio.cpu()
        images = learner.rewards.decode(trajectory.clean_latents).numpy()
        if on_samples is not None:
            on_samples(batch, images)
        believed = learner.rewards.class_log_probs(trajectory.clean_latents, batch.prompts)
        for column, (name, control) in enumerate(config.controls.items()):
            asked = batch.labels[:, column : column + 1]
            paths[ids, 2 + column] = believed[name].cpu().gather(1, asked).double()[:, 0]
            if control.oracle:
                measured = oracle_labels(name, control, images, batch.prompts).classes
                counts = confusion_matrix(batch.labels[:, column].numpy(), measured, control.num_classes)
                confusions[column] += torch.from_numpy(counts)
    paths = all_reduce_sum(paths, rank.device)
    means = paths.mean(0).tolist()
    metrics = {"kl": means[0], "num_samples": float(num_samples)}
    accuracies = []
    for column, (name, control) in enumerate(config.controls.items()):
        metrics[f"log_prob/{name}"] = means[2 + column]
        if control.oracle:
            confusion = all_reduce_sum(confusions[column], rank.device).numpy()
            metrics[f"accuracy/{name}"] = accuracy_of(confusion)
            metrics[f"macro_f1/{name}"] = macro_f1_of(confusion)
            accuracies.append(metrics[f"accuracy/{name}"])
    if accuracies:
        metrics["accuracy"] = float(np.mean(accuracies))
        metrics["macro_f1"] = float(np.mean([metrics[f"macro_f1/{n}"] for n, c in config.controls.items() if c.oracle]))
    return metrics | _certificate(learner, paths.numpy())


def _certificate(learner: Learner, paths: np.ndarray) -> dict[str, float]:
    """The certificate's numbers, of all samples and of each class; none where log Z is not known."""
    config, active = learner.config, tuple(learner.config.controls)
    if not learner.pre_trained_log_probs:
        return {}
    batch = learner.evaluation_batch(range(len(paths)))
    labels = batch.labels[:, : len(active)].numpy()
    known = learner.pre_trained_log_probs
    return certificate_row(certify_labels(paths[:, 1], labels, paths[:, 2:], config.controls, config.kl_coef, known))
