"""What the driver does with the workers' rows: progress display, metrics.jsonl, Aim."""

from __future__ import annotations

from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.rows import (
    EvaluationDone,
    Notice,
    Row,
    SamplesDrawn,
    Started,
    Stopped,
    Stopping,
    UpdateDone,
)
from ctrl_ray.driver.progress import RunProgress
from ctrl_ray.reporting.tracking import METRICS_FILE, RunTracker
from ctrl_ray.runs.folder import RunFolder
from ctrl_ray.wording import floor_text, kl_text


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
            aim=self._config.aim,
            aim_repo=self._config.aim_repo,
            resume_from_update=update if again else None,
        )
        self._progress = RunProgress(self._config.num_updates, update, kl_noise_floor=row.kl_noise_floor)
        if again:
            self._progress.note(f"resumed after update {update}")
        early, self._early = self._early, []
        for waiting in early:
            self(waiting)

    def _log_update(self, row: UpdateDone) -> None:
        assert self._tracker is not None and self._progress is not None
        self._tracker.log("update", row.update, row.metrics)
        self._progress.update(row.update, row.metrics)
        if row.update % self._config.checkpoint_every_updates == 0:
            self._folder.upload(METRICS_FILE)

    def _log_evaluation(self, row: EvaluationDone) -> None:
        assert self._tracker is not None
        floor = self._kl_noise_floor
        known = {} if floor is None else {"kl_noise_floor": floor}
        self._tracker.log("evaluation", row.update, {**row.metrics, **known})
        self._folder.upload(METRICS_FILE)
        accuracy = row.metrics.get("accuracy")
        text = f"accuracy {accuracy:.3f}, " if accuracy is not None else ""
        distance = ""
        if "gap" in row.metrics:
            distance = f", gap {row.metrics['gap']:.1f} ± {row.metrics['gap_standard_error']:.1f} nats"
        self._note(f"evaluation after update {row.update}: {text}{kl_text(row.metrics['kl'], floor)}{distance}")

    def _note(self, text: str) -> None:
        if self._progress is not None:
            self._progress.note(text)
        else:
            print(text, flush=True)
