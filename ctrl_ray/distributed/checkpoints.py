"""What a checkpoint holds: the adapter as it would be exported, and the state to go on from.

    adapter/                      the exported form (see ctrl_ray.policy.adapter)
    training_state.safetensors    consolidated float32 parameters, moments and step count
    progress.json                 updates done, stop-early facts

All ranks take part; rank 0 writes. Any number of workers and any ZeRO stage can resume it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ray.train
from ray.train import Checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctrl_ray.distributed.engine import PolicyEngine
from ctrl_ray.errors import ModelError
from ctrl_ray.policy.adapter import AdapterInfo, save_adapter
from ctrl_ray.policy.policy import ControlledPolicy

STATE_FILE = "training_state.safetensors"
PROGRESS_FILE = "progress.json"
ADAPTER_FOLDER = "adapter"


def report_checkpoint(
    engine: PolicyEngine, info: AdapterInfo, progress: dict[str, Any], score: float, *, validate: bool = False
) -> None:
    """Collective: gather, write on rank 0, hand to Ray Train under the metric 'score'.

    validate: Ray Train evaluates it in a task of its own (`ctrl_ray.distributed.validation`), which sets the score.
    """
    state = engine.state()
    folder = None
    rank = ray.train.get_context().get_world_rank()
    with engine.gathered() as policy:
        if rank == 0:
            folder = Path(tempfile.mkdtemp(prefix="ctrl_ray_checkpoint_"))
            assert isinstance(policy, ControlledPolicy)
            save_adapter(folder / ADAPTER_FOLDER, policy, info)
    metrics = {"score": score, **progress}
    if folder is None:
        ray.train.report(metrics)
        return
    try:
        save_file(state, folder / STATE_FILE)
        (folder / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf-8")
        ray.train.report(metrics, checkpoint=Checkpoint.from_directory(str(folder)), validation=validate)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def read_checkpoint(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state, progress) of a checkpoint folder."""
    state, progress = Path(folder) / STATE_FILE, Path(folder) / PROGRESS_FILE
    if not state.is_file() or not progress.is_file():
        raise ModelError(f"checkpoint {folder} lacks {STATE_FILE} or {PROGRESS_FILE}; it was not written completely")
    return load_file(state), json.loads(progress.read_text(encoding="utf-8"))
