"""What Ray Train could go on from if the run were killed now: it uploads a checkpoint in the background, then registers it."""

from __future__ import annotations

import re
from pathlib import Path


def registered_updates(run_folder: Path) -> list[int]:
    """Updates done at each checkpoint that Ray Train has registered for the run in this folder; [] before the first."""
    snapshots = (run_folder / "checkpoints").glob("*/checkpoint_manager_snapshot.json")
    found = (re.findall(r'"updates_done": ?(\d+)', snapshot.read_text()) for snapshot in snapshots)
    return sorted({int(updates) for each in found for updates in each})
