"""What a checkpoint holds: the adapter as it would be exported, and the state to go on from.

    adapter/                      the exported form (see ctrl_ray.policy.adapter)
    training_state*.safetensors   float32 parameters, moments and step count, whole tensors
    progress.json                 updates done, the KL's noise floor and the precision it was measured in, stop-early facts
    rows.jsonl                    the run's rows of metrics so far, should the driver end before it has written the last ones

With LoRA rank 0 writes the state as one file. With full fine-tuning every rank owns some of the parameters, about as
many bytes as any other, and writes those (training_state-00001-of-00002.safetensors, and the denoiser likewise): 64 MB
(or one parameter) are gathered at a time, so that no rank ever holds the whole state. Either way any number of workers and any
ZeRO stage can resume it, and nothing in it is a pickle, as it would be in DeepSpeed's own checkpoints.

Saving is collective. Ray Train uploads in the background and registers a checkpoint once all ranks' parts are there: a
crash on the way leaves the last good one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray.train
from pyarrow.fs import FileSelector
from ray.train import Checkpoint, CheckpointUploadMode
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.engine import PolicyEngine, load_parameters
from ctrl_ray.distributed.rows import EvaluationDone, MetricsRow, UpdateDone
from ctrl_ray.errors import CheckpointError, ModelError, full_disk
from ctrl_ray.policy.adapter import AdapterInfo, save_adapter, save_adapter_shard, shard_file
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.protocol import TrainablePolicy

STATE = "training_state"
PROGRESS_FILE = "progress.json"
ADAPTER_FOLDER = "adapter"
ROWS_FILE = "rows.jsonl"
_ROWS: Mapping[str, type[UpdateDone] | type[EvaluationDone]] = {"update": UpdateDone, "evaluation": EvaluationDone}
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Beside a full disk, what ends a write and does not pass by itself, as a network's trouble may."""


def report_checkpoint(
    engine: PolicyEngine,
    info: AdapterInfo,
    progress: dict[str, Any],
    score: float,
    *,
    rows: Sequence[MetricsRow] = (),
    validate: bool = False,
    on_lasting: Callable[[CheckpointError], None] = lambda error: None,
) -> None:
    """Collective: write this rank's part, hand it to Ray Train under the metric 'score'.

    rows: of the run's metrics, of which rank 0 writes its own. validate: Ray Train evaluates the checkpoint beside training.
    on_lasting: told of an error that a restart would meet again, which may arise in a thread of Ray Train's.
    CheckpointError when it cannot be written (disk full).
    """
    folder = Path(tempfile.mkdtemp(prefix="ctrl_ray_checkpoint_"))
    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    try:
        write_checkpoint(engine, info, progress, folder, rank, num_ranks)
        if rank == 0:
            write_rows(folder, rows)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _cannot_write(f"after update {progress['updates_done']}", str(folder), error, on_lasting) from error
    metrics = {"score": score, **progress}
    if not any(folder.iterdir()):
        shutil.rmtree(folder)
        ray.train.report(metrics)
        return
    ray.train.report(
        metrics,
        checkpoint=Checkpoint.from_directory(str(folder)),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=functools.partial(_upload, on_lasting=on_lasting),
        delete_local_checkpoint_after_upload=True,
        validation=validate,
    )


def write_checkpoint(
    engine: PolicyEngine, info: AdapterInfo, progress: Mapping[str, Any], folder: Path, rank: int, num_ranks: int
) -> None:
    """Collective: this rank's part of a checkpoint; with LoRA only rank 0 has one."""
    if info.lora is None:
        owners = assign_owners(engine.sizes(), num_ranks)
        shard = engine.state([name for name, owner in owners.items() if owner == rank])
        save_file(shard, folder / shard_file(STATE, rank, num_ranks))
        assert isinstance(engine.policy, ControlledPolicy)
        save_adapter_shard(folder / ADAPTER_FOLDER, engine.policy, info, shard, owners, rank, num_ranks)
    else:
        state = engine.state(None if rank == 0 else ())
        with engine.gathered() as policy:
            if rank == 0:
                assert isinstance(policy, ControlledPolicy)
                save_adapter(folder / ADAPTER_FOLDER, policy, info)
        if rank == 0:
            save_file(state, folder / shard_file(STATE, 0, 1))
    if rank == 0:
        (folder / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")


def assign_owners(sizes: Mapping[str, int], num_ranks: int) -> dict[str, int]:
    """Which rank writes which parameter: the largest first, each to the rank with the least so far.

    Control embeddings are small and belong to rank 0, which writes them into the adapter.
    """
    loads = [0] * num_ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owner = 0 if name.startswith("controls.") else loads.index(min(loads))
        loads[owner] += sizes[name]
        owners[name] = owner
    return owners


def restore_engine(
    policy: TrainablePolicy, config: TrainConfig, prepare: Callable[[dict[str, Any]], None]
) -> tuple[PolicyEngine, dict[str, Any], list[MetricsRow]]:
    """The engine around a policy, as Ray Train's latest checkpoint of this run has it, its progress and the rows of metrics
    up to it; collective.

    prepare: told the progress (that of a new run: no updates done) while the policy is still bare; it may add to it.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        progress: dict[str, Any] = {"updates_done": 0}
        prepare(progress)
        return PolicyEngine(policy, config), progress, []
    with checkpoint.as_directory() as folder:
        state, progress = read_checkpoint(folder)
        rows = read_rows(folder)
        prepare(progress)
        load_parameters(policy, state)
        engine = PolicyEngine(policy, config)
        engine.load_state(state)
    return engine, progress, rows


def read_checkpoint(folder: str | Path) -> tuple[StateFiles, dict[str, Any]]:
    """(state, progress) of a checkpoint folder; the state is read from its files when it is asked for a tensor."""
    progress = Path(folder) / PROGRESS_FILE
    if not progress.is_file():
        raise ModelError(f"checkpoint {folder} lacks {PROGRESS_FILE}; it was not written completely")
    return StateFiles(Path(folder)), json.loads(progress.read_text(encoding="utf-8"))


def write_rows(folder: Path, rows: Sequence[MetricsRow]) -> None:
    """The rows as `read_rows` reads them."""
    kinds = {row_type: kind for kind, row_type in _ROWS.items()}
    lines = [json.dumps({"kind": kinds[type(row)], **dataclasses.asdict(row)}) + "\n" for row in rows]
    (folder / ROWS_FILE).write_text("".join(lines), encoding="utf-8")


def read_rows(folder: str | Path) -> list[MetricsRow]:
    """The rows of metrics that a checkpoint brings; none where an earlier version wrote it."""
    file = Path(folder) / ROWS_FILE
    if not file.is_file():
        return []
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    return [_ROWS[row.pop("kind")](**row) for row in rows]


class StateFiles(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, wherever they lie; one is in memory at a time."""

    def __init__(self, folder: Path) -> None:
        """ModelError when a file is missing or cannot be read."""
        files = sorted(folder.glob(f"{STATE}*.safetensors"))
        count = int(files[0].stem.rsplit("-", 1)[1]) if files and files[0].stem != STATE else 1
        expected = [shard_file(STATE, rank, count) for rank in range(count)]
        if [file.name for file in files] != expected:
            raise ModelError(
                f"checkpoint {folder} holds the state files {[file.name for file in files]}; expected {expected}: it was "
                "not written completely. Remove the folder to go on from an older checkpoint"
            )
        self._files: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, "pt") as opened:
                    self._files |= dict.fromkeys(opened.keys(), file)
            except SafetensorError as error:
                raise ModelError(f"state file {file} of a checkpoint cannot be read: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._files[name], "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _upload(checkpoint: Checkpoint, name: str, on_lasting: Callable[[CheckpointError], None]) -> Checkpoint:
    """Ray Train's own copy to the run's storage; what a failed one leaves is removed, it would never be registered."""
    storage = ray.train.get_context().get_storage()
    try:
        return storage.persist_current_checkpoint(checkpoint, name)
    except OSError as error:
        target = storage.build_checkpoint_path_from_name(name)
        with contextlib.suppress(OSError):  # another rank may have removed it, or still be writing its own part
            storage.storage_filesystem.delete_dir(target)
        raise _cannot_write(name, target, error, on_lasting) from error


def _cannot_write(
    what: str, where: str, error: Exception, on_lasting: Callable[[CheckpointError], None]
) -> CheckpointError:
    """The error to raise, of which `on_lasting` has been told where it would come again."""
    intact = "The last good checkpoint is intact" if _some_checkpoint() else "The run has no checkpoint yet"
    found = CheckpointError(
        f"the checkpoint {what} could not be written to {where}: {error}. {intact}; make room (df -h) or lower "
        "num_checkpoints_to_keep, then go on with the same command and --resume"
    )
    if full_disk(error) is not None or getattr(error, "errno", None) in _FORBIDDEN:
        on_lasting(found)
    return found


def _some_checkpoint() -> bool:
    """Whether the run has a checkpoint that is there as a whole."""
    storage = ray.train.get_context().get_storage()
    selector = FileSelector(storage.experiment_fs_path, recursive=True, allow_not_found=True)
    try:
        return any(Path(info.path).name == PROGRESS_FILE for info in storage.storage_filesystem.get_file_info(selector))
    except OSError:
        return False
