"""A small actor between the training workers and the driver: rows one way, a stop request the other."""

from __future__ import annotations

from typing import Any

from ctrl_ray.distributed.rows import Stop


class MetricsChannel:
    """Rank 0 puts rows (metrics, notices); the driver drains them and may ask the workers to stop."""

    def __init__(self) -> None:
        self._rows: list[Any] = []
        self._stop: Stop | None = None
        self._failure: Exception | None = None

    def put(self, row: Any) -> Stop | None:
        """Add a row (of a run: a `rows.Row`); returns the stop that was requested, if there was one."""
        self._rows.append(row)
        return self._stop

    def drain(self) -> list[Any]:
        """Take all rows, in the order in which they came."""
        rows, self._rows = self._rows, []
        return rows

    def request_stop(self, stop: Stop) -> None:
        """Workers leave a checkpoint and return after the update under way. A person's wish counts before target_kl."""
        if self._stop is None or stop.kind == "asked":
            self._stop = stop

    def fail(self, error: Exception) -> None:
        """A worker met an error that no restart cures; the first one counts."""
        self._failure = self._failure or error

    def failure(self) -> Exception | None:
        """That error, if there was one."""
        return self._failure
