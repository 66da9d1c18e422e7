"""A pytest plugin (`-p tests.gpu.reporter`) that tells the session of tests as they are collected, start and end.

A JSON object a line goes to the file that the environment names; pytest's own report would come when all is over. Figures
that tests and the benchmark measure go to another. No torch here: this is imported before anything is set.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

EVENTS = "CTRL_RAY_GPU_EVENTS"
"""Environment: the file."""
MEASURED = "CTRL_RAY_GPU_MEASURED"
"""Environment: the file of figures."""
TAIL = 4000
"""Characters of a failure that are kept."""

_running: dict[str, dict[str, Any]] = {}


def record(test: str, **figures: Any) -> None:
    """Hand figures of a test, or of a part of the benchmark, to the session (none where nobody asked for them)."""
    if path := os.environ.get(MEASURED):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"test": test, **figures}) + "\n")


def _tell(**event: Any) -> None:
    with open(os.environ[EVENTS], "a", encoding="utf-8") as file:
        file.write(json.dumps(event) + "\n")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Which tests there are, in order."""
    _tell(collected=[item.nodeid for item in session.items])


def pytest_runtest_logstart(nodeid: str) -> None:
    """A test begins with its fixtures."""
    _running[nodeid] = {"status": "passed", "seconds": 0.0}
    _tell(started=nodeid)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Of setup, call and teardown; the worst of them counts."""
    test = _running[report.nodeid]
    test["seconds"] += report.duration
    if report.failed:
        test |= {"status": "failed", "tail": report.longreprtext[-TAIL:]}
    elif report.skipped and test["status"] == "passed":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        test |= {"status": "skipped", "tail": reason.removeprefix("Skipped: ")}


def pytest_runtest_logfinish(nodeid: str) -> None:
    """A test is over."""
    test = _running.pop(nodeid)
    _tell(finished=nodeid, **{**test, "seconds": round(test["seconds"], 2)})
