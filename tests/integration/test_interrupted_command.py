"""Ctrl-C at a command that has started a Ray of its own, as a terminal sends it: to all processes in the foreground."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.full


def test_labelling_ends_in_one_line_and_takes_its_ray_along(tmp_path: Path) -> None:
    """130, no traceback, no half-written data set, and no process of the session is left."""
    output, log = tmp_path / "data.parquet", tmp_path / "stderr"
    arguments = ["--images", str(tmp_path / "images"), "--draw-shapes", "1500", "--output", str(output)]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "ctrl_ray", "label", *arguments],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background process ignores it
        )
    try:
        deadline = time.monotonic() + 120
        while "label:" not in log.read_text():  # the progress bar: Ray is there, Ray Data begins
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(timeout=60) == 130
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    rays_or_the_bar = re.compile(r"\d{4}-\d\d-\d\d .*\bWARNING |\s*$|label:")  # Ray warns at its start about its tokens
    said = [line for line in log.read_text().splitlines() if not rays_or_the_bar.match(line)]
    assert said == ["interrupted"]
    assert not output.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["images", "stderr"]
    _wait_until_gone(process.pid)


def _wait_until_gone(session: int) -> None:
    deadline = time.monotonic() + 20
    while left := _of_session(session):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _of_session(session: int) -> list[str]:
    """Command lines of the session's processes that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, own = stat.read_text().rpartition(")")[2].split()[:4]
            if int(own) == session and state != "Z":
                found.append((stat.parent / "cmdline").read_text().replace("\0", " "))
        except OSError:  # it has just ended
            continue
    return found
