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
    ids: range, dropout: float = 0.25, active: tuple[str, ...] = ("size", "hue"), size: int = 16, update: int = 7
) -> Batch:
    return training_batch(0, update, ids, PROMPTS, CONTROLS, active, dropout, global_batch_size=size)


def test_a_sample_is_the_same_on_any_rank() -> None:
    """One batch of 16 equals two of 8 and four of 4."""
    whole = _batch(range(16))
    for size in (8, 4):
        parts = [_batch(range(start, start + size)) for start in range(0, 16, size)]
        assert sum((part.prompts for part in parts), ()) == whole.prompts
        assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)


def test_label_law_dropout_and_strengths() -> None:
    """Within an update every class as often as its law says, to one; over updates a sample alone follows the law, and the
    controls do not follow each other. Null labels have strength 0."""
    batch, size = _batch(range(16)), 16
    counts = (
        torch.bincount(batch.labels[:, 0], minlength=5).tolist(),
        torch.bincount(batch.labels[:, 1], minlength=3).tolist(),
    )
    for found, law in zip(counts, ((0.1875,) * 4 + (0.25,), (0.1875, 0.5625, 0.25)), strict=True):
        assert all(abs(count - size * share) < 1 for count, share in zip(found, law, strict=True)), (found, law)
    assert torch.equal(batch.strengths == 0, batch.labels == torch.tensor([4, 2]))
    assert set(batch.strengths[:, 0].tolist()) == {0.0, 4.0}
    n = 2000
    labels = torch.stack([_batch(range(3, 4), update=update).labels[0] for update in range(n)])
    joint = torch.zeros(5, 3).index_put((labels[:, 0], labels[:, 1]), torch.ones(n), accumulate=True) / n
    law = torch.tensor([0.1875] * 4 + [0.25])[:, None] * torch.tensor([0.1875, 0.5625, 0.25])
    assert bool(((joint - law).abs() < 4 * (law * (1 - law) / n).sqrt()).all())


def test_inactive_controls_are_always_null() -> None:
    """A control that only the initial adapter has is not asked for."""
    assert bool((_batch(range(50), 0.0, ("hue",), 50).labels[:, 0] == 4).all())


def test_evaluation_is_balanced() -> None:
    """Every combination of classes equally often, with every prompt."""
    batch = evaluation_batch(range(48), PROMPTS, CONTROLS, ("size", "hue"))
    rows = [(*label, prompt) for label, prompt in zip(batch.labels.tolist(), batch.prompts, strict=True)]
    assert sorted(rows) == sorted((s, h, p) for s in range(4) for h in range(2) for p in PROMPTS for _ in range(2))
