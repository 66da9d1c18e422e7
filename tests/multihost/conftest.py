"""What tests with several hosts share."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.multihost.hosts import why_not

Say = Callable[[str], None]


@pytest.fixture(autouse=True)
def _can_be_made() -> None:
    if reason := why_not():
        pytest.skip(reason)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Print a line, with the seconds since the start, although pytest captures output."""
    start = time.monotonic()

    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {time.monotonic() - start:4.0f} s  {text}", end="", flush=True)

    return say
