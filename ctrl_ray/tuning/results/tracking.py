"""The trials of a sweep in its tracker: one run each, written by the driver alone, from what the trials leave on disk."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ctrl_ray.config.tracker import Tracker
from ctrl_ray.reporting.report import REPORT, report_pictures
from ctrl_ray.reporting.sinks import Sink, open_sink
from ctrl_ray.reporting.tracking import METRICS_FILE
from ctrl_ray.tuning.results.trials import SweepTrial, short_names

_NOT_METRICS = ("kind", "update", "time")


class SweepTracker:
    """Copies rows of the trials' metrics.jsonl to the tracker as they come, and at a trial's end the pictures of its report.

    Args:
        tracker: Which; not 'none'.
        folder: What it writes beside the sweep (`tracker_folder`); remembers which Aim run each trial is.
        experiment: Name of the sweep.
        config: Settings that all trials start from.
        resume: Go on with the runs that `folder` names.
    """

    def __init__(
        self, tracker: Tracker, folder: Path, *, experiment: str, config: Mapping[str, Any], resume: bool
    ) -> None:
        self._tracker, self._folder, self._experiment = tracker, folder, experiment
        self._config, self._resume = config, resume
        self._sinks: dict[str, Sink] = {}
        self._tails: dict[str, _Tail] = {}
        self._known: set[str] = set()
        self._broken = False

    def follow(self, trials: Sequence[SweepTrial]) -> None:
        """Log what is new in the trials' files; runs of trials that have ended are closed."""
        for trial in trials:
            if trial.folder is None or trial.status == "waiting" or self._complete(trial.name).is_file():
                continue
            tail = self._tails.setdefault(trial.name, _Tail(trial.folder / METRICS_FILE))
            rows = tail.read()
            if rows:
                self._try("log metrics", partial(self._log, trial, rows))
            if trial.status == "finished":
                self._try("log images", partial(self._log_pictures, trial))
            if trial.status != "running":
                self._close(trial.name)

    def log_images(self, name: str, images: Mapping[str, Path]) -> None:
        """The sweep's figures, as images of a run of its own."""

        self._try("log images", lambda: _log_files(self._open(name, {}), 0, images))
        self._close(name)

    def close(self) -> None:
        """Close every run."""
        for name in list(self._sinks):
            self._close(name)

    def _log(self, trial: SweepTrial, rows: Sequence[Mapping[str, Any]]) -> None:
        sink = self._open(trial.name, trial.knobs)
        for row in rows:
            values = {key: value for key, value in row.items() if key not in _NOT_METRICS and value is not None}
            sink.log_metrics(row["kind"], row["update"], values)

    def _log_pictures(self, trial: SweepTrial) -> None:
        assert trial.folder is not None
        _log_files(self._open(trial.name, trial.knobs), trial.updates_done, report_pictures(trial.folder / REPORT))
        self._complete(trial.name).touch()

    def _complete(self, name: str) -> Path:
        """Marks a finished trial whose run has all there is to log, so that a resumed sweep leaves it alone."""
        return self._folder / f"complete_{name}"

    def _open(self, name: str, knobs: Mapping[str, Any]) -> Sink:
        if name not in self._sinks:
            short = short_names(list(knobs))
            sink = open_sink(
                self._tracker,
                self._folder,
                member=name,
                run_name=name,
                config=self._config,
                resume=self._resume or name in self._known,
                purge_after=0 if self._resume and name not in self._known else None,  # rows are read from the first
                experiment=self._experiment,
                knobs={short[path].replace(".", "_"): value for path, value in knobs.items()},
            )
            assert sink is not None
            self._sinks[name] = sink
            self._known.add(name)
        return self._sinks[name]

    def _close(self, name: str) -> None:
        sink = self._sinks.pop(name, None)
        if sink is not None:
            self._try("close", sink.close)

    def _try(self, what: str, action: Callable[[], None]) -> None:
        """A tracker is a view: whatever it raises is said once, and the sweep goes on without it."""
        if self._broken:
            return
        try:
            action()
        except Exception as error:
            self._broken = True
            warnings.warn(
                f"{self._tracker.title} could not {what} ({type(error).__name__}: {error}); the sweep goes on, every trial's "
                f"curves are in its {METRICS_FILE}",
                RuntimeWarning,
                stacklevel=3,
            )


def _log_files(sink: Sink, update: int, images: Mapping[str, Path]) -> None:
    for title, path in images.items():
        with Image.open(path) as picture:
            sink.log_images(update, title, [picture.convert("RGB")], [title])


class _Tail:
    """The rows that were added to a file since the last look; a file that was rewritten is read from its start."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._inode = path, 0, -1

    def read(self) -> list[dict[str, Any]]:
        """Whole lines only."""
        try:
            found = self._path.stat()
            if found.st_ino != self._inode:
                self._offset, self._inode = 0, found.st_ino
            if found.st_size <= self._offset:
                return []
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        self._offset += end
        return [json.loads(line) for line in data[:end].splitlines()]
