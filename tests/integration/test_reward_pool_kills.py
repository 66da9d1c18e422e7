"""A pool of two whose actors are killed twenty times at random moments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration import reward_pool_kills

pytestmark = pytest.mark.slow

_ROOT = Path(__file__).resolve().parents[2]


def test_twenty_kills_lose_no_request_repeat_no_answer_and_leave_nothing_in_the_store() -> None:
    """Every answer is bitwise the local one, and Ray's state API lists the given model only, then nothing."""
    done = subprocess.run(
        [sys.executable, "-m", reward_pool_kills.__name__],
        cwd=_ROOT,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=500,
        check=True,
    )
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray writes there too
    report = json.loads(line)
    assert report["errors"] == []
    assert report["kills"] == report["processes"] == report["replaced"] == 20
    for asked, answered, equal in report["counts"]:
        assert asked == answered == equal >= 1, report
    assert report["pool_requests"] == 1 + sum(asked for asked, _, _ in report["counts"])
    assert report["failed"] == 0 and report["resent"] >= 10
    assert report["seen_while_one_waits"] >= 2, "the measurement does not see a request that waits"
    assert len(report["left_in_the_open_pool"]) <= 1, report
    assert report["left_after"] == []
