"""A small actor between the training workers and the driver: rows one way, a stop request the other."""

from __future__ import annotations

from typing import Any


class MetricsChannel:
    """Rank 0 puts rows (metrics, notices); the driver drains them and may ask the workers to stop."""

    def __init__(self) -> None:
        self._rows: list[Any] = []
        self._stop = ""
        self._failure: Exception | None = None

    def put(self, row: Any) -> str:
        """Add a row (of a run: a `rows.Row`); returns the reason for stopping, '' while there is none."""
        self._rows.append(row)
        return self._stop

    def drain(self) -> list[Any]:
        """Take all rows, in the order in which they came."""
        rows, self._rows = self._rows, []
        return rows

    def request_stop(self, reason: str) -> None:
        """Workers leave a checkpoint and return after the update under way."""
        self._stop = reason

    def fail(self, error: Exception) -> None:
        """A worker met an error that no restart cures; the first one counts."""
        self._failure = self._failure or error

    def failure(self) -> Exception | None:
        """That error, if there was one."""
        return self._failure
