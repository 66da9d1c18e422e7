"""Checkpoints in parts: who writes what, and how they are read."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray.train
import torch
from pyarrow.fs import LocalFileSystem
from safetensors import SafetensorError
from safetensors.torch import save_file

from ctrl_ray.distributed import checkpoints
from ctrl_ray.distributed.checkpoints import (
    _cannot_write,
    _upload,
    assign_owners,
    read_checkpoint,
    read_rows,
    write_rows,
)
from ctrl_ray.distributed.rows import EvaluationDone, UpdateDone
from ctrl_ray.errors import CheckpointError, ModelError
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


def test_rows_of_metrics_travel_with_a_checkpoint(tmp_path: Path) -> None:
    """Each as it was, its time too; a checkpoint of an earlier version has none."""
    rows = [
        EvaluationDone(0, {"kl": 0.0, "accuracy/size": 0.25}, time=1.5),
        UpdateDone(1, {"reward": -0.1, "kl": 0.5}, time=2.5),
    ]
    assert read_rows(tmp_path) == []
    write_rows(tmp_path, rows)
    again = read_rows(tmp_path)
    assert again == rows and [row.time for row in again] == [1.5, 2.5]


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError("AWS Error NETWORK_CONNECTION during PutObject operation"), False),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_a_full_disk_is_not_tried_again(
    error: Exception, lasting: bool, earlier: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the thread of Ray Train's that copies a checkpoint; what is intact is only told where there is something."""

    class Storage:
        storage_filesystem = LocalFileSystem()
        experiment_fs_path = str(tmp_path / "checkpoints" / "run")

        def build_checkpoint_path_from_name(self, name: str) -> str:
            return f"{self.experiment_fs_path}/{name}"

        def persist_current_checkpoint(self, checkpoint: object, name: str) -> None:
            half = Path(self.build_checkpoint_path_from_name(name))
            half.mkdir(parents=True)
            (half / "progress.json").write_text("{}")
            raise error

    storage = Storage()
    if earlier:
        whole = Path(storage.build_checkpoint_path_from_name("checkpoint_1"))
        whole.mkdir(parents=True)
        (whole / "progress.json").write_text("{}")
    monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: storage))
    told: list[CheckpointError] = []
    with pytest.raises(CheckpointError, match=r"could not be written to .*--resume") as caught:
        _upload(cast(Any, None), "checkpoint_2", told.append)
    assert told == ([caught.value] if lasting else [])
    assert ("The last good checkpoint is intact" in str(caught.value)) is earlier
    assert ("The run has no checkpoint yet" in str(caught.value)) is not earlier
    assert not Path(storage.build_checkpoint_path_from_name("checkpoint_2")).exists()


def test_safetensors_own_error_of_a_full_disk_is_lasting_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "_some_checkpoint", lambda: False)
    told: list[CheckpointError] = []
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert told == [] and _cannot_write("after update 3", "/tmp/x", full, told.append) == told[0]
