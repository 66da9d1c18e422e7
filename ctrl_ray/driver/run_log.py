"""What the driver does with the workers' rows: progress display, metrics.jsonl, Aim."""

from __future__ import annotations

from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.rows import (
    EvaluationDone,
    MetricsRow,
    Notice,
    Row,
    SamplesDrawn,
    Started,
    Stopped,
    Stopping,
    UpdateDone,
)
from ctrl_ray.driver.progress import RunProgress
from ctrl_ray.reporting.tracking import METRICS_FILE, Kind, RunTracker, read_metrics
from ctrl_ray.runs.folder import RunFolder
from ctrl_ray.wording import accuracy_text, floor_text, kl_text

_NOTHING_DONE = -1
"""Workers that begin before the first update evaluate the pre-trained model once more."""


class RunLog:
    """Rows from the workers: to the progress display, metrics.jsonl and Aim; this process is their only writer."""

    def __init__(self, config: TrainConfig, folder: RunFolder, *, resume: bool) -> None:
        self._config, self._folder, self._resume = config, folder, resume
        self._tracker: RunTracker | None = None
        self._progress: RunProgress | None = None
        self._early: list[Row] = []
        self._kl_noise_floor: float | None = None

    def __call__(self, row: Row) -> None:
        """Show and record a row."""
        match row:
            case Started():
                self._start(row)
            case UpdateDone():
                self._log_update(row)
            case EvaluationDone() | SamplesDrawn() if self._tracker is None:
                # an evaluation that the resumed run makes up for, before its workers have started
                self._early.append(row)
            case EvaluationDone():
                self._log_evaluation(row)
            case SamplesDrawn():
                assert self._tracker is not None
                self._tracker.log_images(row.update, "during", row.images, row.captions)
            case Notice():
                self._note(row.text)
            case Stopping():
                self._note(f"{row.signal}: leaving a checkpoint after this update (once more to stop at once)")
            case Stopped():
                floor = self._kl_noise_floor if row.stop.kind == "target_kl" else None
                text = row.stop.text + ("" if floor is None else f" (floor {floor_text(floor)})")
                self._note(f"stopped after update {row.update}: {text}")

    def close(self) -> None:
        """End the display and the tracker."""
        if self._progress is not None:
            self._progress.close()
        if self._tracker is not None:
            self._tracker.close()

    def _start(self, row: Started) -> None:
        """Also after a lost worker: rows of updates that will be done again are dropped."""
        update, self._kl_noise_floor = row.update, row.kl_noise_floor
        again = self._tracker is not None or self._resume
        self.close()
        self._tracker = RunTracker(
            self._folder.local,
            run_name=self._folder.name,
            config=self._config,
            tracker=self._config.tracker,
            resume_from_update=(update or _NOTHING_DONE) if again else None,
        )
        self._progress = RunProgress(self._config.num_updates, update, kl_noise_floor=row.kl_noise_floor)
        if again:
            self._progress.note(f"resumed after update {update}")
            self._write_missing(row)
        early, self._early = self._early, []
        for waiting in early:
            self(waiting)

    def _write_missing(self, started: Started) -> None:
        """Rows that the checkpoint brings and that an earlier driver did not come to write."""
        assert self._tracker is not None
        written = {(row["kind"], row["update"]) for row in read_metrics(self._folder.local)}
        for row in started.rows if started.update else ():
            kind: Kind = "update" if isinstance(row, UpdateDone) else "evaluation"
            if (kind, row.update) not in written:
                self._tracker.log(kind, row.update, self._known_of(row), at=row.time)

    def _known_of(self, row: MetricsRow) -> dict[str, float]:
        """The metrics of a row, beside an evaluation's KL what rounding reads as KL."""
        floor = self._kl_noise_floor
        known = {} if floor is None or isinstance(row, UpdateDone) else {"kl_noise_floor": floor}
        return {**row.metrics, **known}

    def _log_update(self, row: UpdateDone) -> None:
        assert self._tracker is not None and self._progress is not None
        self._tracker.log("update", row.update, row.metrics, at=row.time)
        self._progress.update(row.update, row.metrics)
        if row.update % self._config.checkpoint_every_updates == 0:
            self._folder.upload(METRICS_FILE)

    def _log_evaluation(self, row: EvaluationDone) -> None:
        assert self._tracker is not None
        self._tracker.log("evaluation", row.update, self._known_of(row), at=row.time)
        self._folder.upload(METRICS_FILE)
        gap, error = row.metrics.get("gap"), row.metrics.get("gap_standard_error")
        parts = [accuracy_text(row.metrics), kl_text(row.metrics["kl"], self._kl_noise_floor)]
        parts.append("" if gap is None or error is None else f"{gap:.2f} ± {error:.2f} nats from the target")
        self._note(f"evaluation after update {row.update}: {', '.join(part for part in parts if part)}")

    def _note(self, text: str) -> None:
        if self._progress is not None:
            self._progress.note(text)
        else:
            print(text, flush=True)
