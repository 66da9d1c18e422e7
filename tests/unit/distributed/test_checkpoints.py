"""Checkpoints in parts: who writes what, and how they are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ctrl_ray.distributed.checkpoints import assign_owners, read_checkpoint
from ctrl_ray.errors import ModelError
from ctrl_ray.policy.adapter import shard_file


def test_every_parameter_of_a_checkpoint_has_one_owner_and_ranks_carry_alike() -> None:
    """By hand: 9 | 7, 3 against 9, 2 with the embedding at rank 0; no rank carries more than the mean and the largest."""
    sizes = {"a": 7, "b": 9, "controls.x": 2, "c": 3}
    assert assign_owners(sizes, 2) == {"b": 0, "a": 1, "c": 1, "controls.x": 0}
    assert assign_owners(sizes, 1) == dict.fromkeys(sizes, 0)
    sizes = {f"p{i}": (i * 7919) % 1000 + 1 for i in range(200)}
    owners = assign_owners(sizes, 7)
    loads = [sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(7)]
    assert owners.keys() == sizes.keys() and max(loads) <= sum(sizes.values()) / 7 + max(sizes.values())


def test_a_checkpoint_in_parts_is_read_as_one_and_a_missing_part_is_named(tmp_path: Path) -> None:
    """Tensors come from whichever file has them."""
    (tmp_path / "progress.json").write_text('{"updates_done": 4}')
    parts = [{"a": torch.arange(3.0), "step": torch.tensor(4.0)}, {"b": torch.ones(2, 2), "step": torch.tensor(4.0)}]
    files = [tmp_path / shard_file("training_state", rank, 2) for rank in range(2)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, file)
    state, progress = read_checkpoint(tmp_path)
    assert progress == {"updates_done": 4} and set(state) == {"a", "b", "step"} and len(state) == 3
    assert torch.equal(state["a"], parts[0]["a"]) and torch.equal(state["b"], parts[1]["b"])
    files[0].write_bytes(files[0].read_bytes()[:-4])  # torn
    with pytest.raises(ModelError, match=r"training_state-00001-of-00002.*cannot be read"):
        read_checkpoint(tmp_path)
    files[0].unlink()
    with pytest.raises(ModelError, match=r"holds the state files .*expected .*00001-of-00002.*not written completely"):
        read_checkpoint(tmp_path)
