"""A small actor between the training workers and the driver: rows one way, a stop request the other."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Any

import ray

from ctrl_ray.distributed.rows import EvaluationDone, MetricsRow, Notice, Started, Stop, UpdateDone


class MetricsChannel:
    """Rank 0 puts rows (metrics, notices); the driver drains them and may ask the workers to stop."""

    def __init__(self) -> None:
        self._rows: list[Any] = []
        self._history: list[MetricsRow] = []
        self._stop: Stop | None = None
        self._failure: Exception | None = None
        self._controller: Any = None

    def put(self, row: Any) -> Stop | None:
        """Add a row (of a run: a `rows.Row`); returns the stop that was requested, if there was one."""
        if isinstance(row, UpdateDone | EvaluationDone):
            row = dataclasses.replace(row, time=time.time())
            self._history.append(row)
        elif isinstance(row, Started):
            self._go_on_after(row)
        self._rows.append(row)
        return self._stop

    def history(self) -> list[MetricsRow]:
        """The rows of metrics that the run has had, those of earlier sessions too: what a checkpoint takes along."""
        return self._history

    def _go_on_after(self, row: Started) -> None:
        """Later updates will be done again; what came beside training, and the checkpoint does not know, stays."""
        known = {(type(old), old.update) for old in row.rows}
        others = [new for new in self._history if new.update <= row.update and (type(new), new.update) not in known]
        self._history = [*row.rows, *others]

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

    def introduce_controller(self, controller: Any) -> None:
        """Ray Train's controller says who it is."""
        self._controller = controller

    def take_controller(self) -> Any:
        """Its handle, if it has started, and forget it: the controller knows this actor, and two actors that hold each other
        would live as long as Ray."""
        controller, self._controller = self._controller, None
        return controller


@dataclass(frozen=True)
class Notifier:
    """Sends lines for the person who waits to the driver; it travels to workers that know nothing of rows."""

    channel: Any
    """MetricsChannel handle."""

    def __call__(self, line: str) -> None:
        ray.get(self.channel.put.remote(Notice(line)))
