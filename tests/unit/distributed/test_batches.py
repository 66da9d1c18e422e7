"""Who gets which label, and that it does not depend on the number of workers."""

from __future__ import annotations

import torch

from ctrl_ray.config import ControlConfig
from ctrl_ray.distributed.batches import Batch, evaluation_batch, training_batch

CONTROLS = {
    "size": ControlConfig(classes=("a", "b", "c", "d"), guidance_strength=4.0),
    "hue": ControlConfig(classes=("x", "y"), guidance_strength=2.0, label_weights=(1.0, 3.0)),
}
PROMPTS = ("one", "two", "three")


def _batch(
    ids: range,
    dropout: float = 0.25,
    active: tuple[str, ...] = ("size", "hue"),
    update: int = 7,
    systematic_over: int | None = None,
) -> Batch:
    return training_batch(0, update, ids, PROMPTS, CONTROLS, active, dropout, systematic_over=systematic_over)


def test_a_sample_is_the_same_on_any_rank() -> None:
    """One batch of 16 equals two of 8 and four of 4."""
    whole = _batch(range(16))
    for size in (8, 4):
        parts = [_batch(range(start, start + size)) for start in range(0, 16, size)]
        assert sum((part.prompts for part in parts), ()) == whole.prompts
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_label_law_dropout_and_strengths() -> None:
    """Uniform and weighted laws, null labels with strength 0, within four standard errors."""
    n = 4000
    batch = _batch(range(n))
    null = (batch.labels == torch.tensor([4, 2])).double().mean(0)
    assert bool(((null - 0.25).abs() < 4 * (0.25 * 0.75 / n) ** 0.5).all())
    assert torch.equal(batch.strengths == 0, batch.labels == torch.tensor([4, 2]))
    assert set(batch.strengths[:, 0].tolist()) == {0.0, 4.0}
    hue = batch.labels[:, 1][batch.labels[:, 1] < 2].double()
    assert abs(float(hue.mean()) - 0.75) < 4 * (0.75 * 0.25 / len(hue)) ** 0.5
    size = batch.labels[:, 0][batch.labels[:, 0] < 4]
    shares = torch.bincount(size, minlength=4) / len(size)
    assert bool(((shares - 0.25).abs() < 4 * (0.25 * 0.75 / len(size)) ** 0.5).all())


def test_systematic_labels_are_as_often_as_their_shares_say() -> None:
    """Within an update to one; over updates a sample alone follows the law, and the controls do not follow each other."""
    batch, size = _batch(range(16), systematic_over=16), 16
    law = ((0.1875,) * 4 + (0.25,), (0.1875, 0.5625, 0.25))
    for column, shares in enumerate(law):
        counts = torch.bincount(batch.labels[:, column], minlength=len(shares)).tolist()
        assert all(abs(count - size * share) < 1 for count, share in zip(counts, shares, strict=True)), (counts, shares)
    assert torch.equal(batch.strengths == 0, batch.labels == torch.tensor([4, 2]))
    assert torch.equal(_batch(range(5, 9), systematic_over=16).labels, batch.labels[5:9])  # the same on any rank
    n = 2000
    labels = torch.stack([_batch(range(3, 4), update=update, systematic_over=16).labels[0] for update in range(n)])
    joint = torch.zeros(5, 3).index_put((labels[:, 0], labels[:, 1]), torch.ones(n), accumulate=True) / n
    product = torch.tensor(law[0])[:, None] * torch.tensor(law[1])
    assert bool(((joint - product).abs() < 4 * (product * (1 - product) / n).sqrt()).all())


def test_inactive_controls_are_always_null() -> None:
    """A control that only the initial adapter has is not asked for."""
    assert bool((_batch(range(50), 0.0, ("hue",)).labels[:, 0] == 4).all())


def test_evaluation_is_balanced() -> None:
    """Every combination of classes equally often, with every prompt."""
    batch = evaluation_batch(range(48), PROMPTS, CONTROLS, ("size", "hue"))
    rows = [(*label, prompt) for label, prompt in zip(batch.labels.tolist(), batch.prompts, strict=True)]
    assert sorted(rows) == sorted((s, h, p) for s in range(4) for h in range(2) for p in PROMPTS for _ in range(2))
