"""Which card, and which versions of what runs on it; this process takes nothing of the card."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "ray", "deepspeed", "diffusers", "transformers", "peft", "numpy", "safetensors")
_ASK_TORCH = "import torch; print(torch.version.cuda, torch.backends.cudnn.version())"


def facts() -> dict[str, Any]:
    """Cards, driver, CUDA, cuDNN, packages, commit; None for what cannot be learned."""
    cards = _said("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader") or ""
    cuda, _, cudnn = (_said(sys.executable, "-c", _ASK_TORCH) or "None None").splitlines()[-1].partition(" ")
    rows = [[cell.strip() for cell in line.split(",")] for line in cards.splitlines()]
    return {
        "cards": [f"{name}, {memory}" for name, memory, _ in rows],
        "driver": rows[0][2] if rows else None,
        "cuda": None if cuda == "None" else cuda,
        "cudnn": None if cudnn == "None" else cudnn,
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": _said("git", "rev-parse", "HEAD"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    """What a command prints; None where it is not there, or does not succeed within a minute."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).resolve().parents[2]
        )
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
