"""What a user installs: the package with the embedded example, without README's pictures and without tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"


@pytest.mark.full
def test_the_wheel_holds_what_runs_and_no_picture_of_the_readme(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a build leaves its own files beside pyproject.toml
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "ctrl_ray", source / "ctrl_ray", ignore=shutil.ignore_patterns("__pycache__"))
    built = subprocess.run(
        [sys.executable, "-c", _BUILD, str(tmp_path)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tmp_path / built.stdout.splitlines()[-1]) as wheel:
        names = set(wheel.namelist())
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ctrl_ray").rglob("*") if path.is_file()}
    needed = {name for name in files if name.endswith((".py", ".typed", ".safetensors", ".json", ".txt"))}
    assert needed <= names, sorted(needed - names)
    (metadata,) = {name.split("/")[0] for name in names} - {"ctrl_ray"}
    assert metadata.endswith(".dist-info"), "neither tests nor tune_spaces"
    pictures = {name for name in names if name.endswith(".png")}
    assert pictures == {"ctrl_ray/shapes/classifier/reliability.png"}, (
        "the classifier's own, which a run's report shows"
    )
