"""What the driver does with the workers' rows: progress display, metrics.jsonl, Aim."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctrl_ray.config import TrainConfig
from ctrl_ray.driver.progress import RunProgress
from ctrl_ray.reporting.tracking import METRICS_FILE, RunTracker
from ctrl_ray.runs.folder import RunFolder


class RunLog:
    """Rows from the workers: to the progress display, metrics.jsonl and Aim; this process is their only writer."""

    def __init__(self, config: TrainConfig, folder: RunFolder, *, resume: bool) -> None:
        self._config, self._folder, self._resume = config, folder, resume
        self._tracker: RunTracker | None = None
        self._progress: RunProgress | None = None
        self._early: list[Mapping[str, Any]] = []

    def __call__(self, row: Mapping[str, Any]) -> None:
        if self._tracker is None and row["kind"] in ("evaluation", "samples"):
            self._early.append(row)  # an evaluation that the resumed run makes up for, before its workers have started
            return
        getattr(self, f"_on_{row['kind']}")(row)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._tracker is not None:
            self._tracker.close()

    def _on_started(self, row: Mapping[str, Any]) -> None:
        """Also after a lost worker: rows of updates that will be done again are dropped."""
        again = self._tracker is not None or self._resume
        self.close()
        self._tracker = RunTracker(
            self._folder.local,
            run_name=self._folder.name,
            config=self._config,
            aim=self._config.aim,
            aim_repo=self._config.aim_repo,
            resume_from_update=row["update"] if again else None,
        )
        self._progress = RunProgress(self._config.num_updates, row["update"])
        if again:
            self._progress.note(f"resumed after update {row['update']}")
        early, self._early = self._early, []
        for waiting in early:
            self(waiting)

    def _on_update(self, row: Mapping[str, Any]) -> None:
        assert self._tracker is not None and self._progress is not None
        self._tracker.log("update", row["update"], row["metrics"])
        self._progress.update(row["update"], row["metrics"])
        if row["update"] % self._config.checkpoint_every_updates == 0:
            self._folder.upload(METRICS_FILE)

    def _on_evaluation(self, row: Mapping[str, Any]) -> None:
        assert self._tracker is not None and self._progress is not None
        self._tracker.log("evaluation", row["update"], row["metrics"])
        self._folder.upload(METRICS_FILE)
        accuracy = row["metrics"].get("accuracy")
        text = f"accuracy {accuracy:.3f}, " if accuracy is not None else ""
        self._progress.note(f"evaluation after update {row['update']}: {text}KL {row['metrics']['kl']:.2f} nats")

    def _on_samples(self, row: Mapping[str, Any]) -> None:
        assert self._tracker is not None
        self._tracker.log_images(row["update"], "during", row["images"], row["captions"])

    def _on_notice(self, row: Mapping[str, Any]) -> None:
        self._progress.note(row["text"]) if self._progress is not None else print(row["text"], flush=True)

    def _on_stopping(self, row: Mapping[str, Any]) -> None:
        text = f"{row['reason']}: leaving a checkpoint after this update (once more to stop at once)"
        self._progress.note(text) if self._progress is not None else print(text, flush=True)

    def _on_stopped(self, row: Mapping[str, Any]) -> None:
        assert self._progress is not None
        self._progress.note(f"stopped after update {row['update']}: {row['reason']}")
