"""The curves of a run: `metrics.jsonl` is the truth, a tracker (Aim, TensorBoard) a view of it with images."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from ctrl_ray.errors import DataError, RunFolderError
from ctrl_ray.evaluation.metric_names import check_names
from ctrl_ray.reporting.sinks import Sink, open_sink, present_tracker, tracker_folder
from ctrl_ray.runs.files import whole_file

METRICS_FILE = "metrics.jsonl"

Kind = Literal["update", "evaluation"]


class RunTracker:
    """The single writer of a run's metrics. Create one per run, in one process; a context manager closes it.

    Args:
        run_dir: Local folder of the run; made when missing.
        run_name: Name of the run in the tracker.
        config: The run's settings (a dataclass or a mapping): Aim's hyper-parameters.
        tracker: What is written to as well, in `run_dir` (see `TrainConfig.tracker`). When it fails, the run warns once and
            goes on.
        resume_from_update: None starts a run. n goes on after update n: rows of later updates, and a torn last line,
            are dropped, because those updates will be done again.

    Raises:
        RunFolderError: A new run, but the folder already holds metrics.
        DataError: A resumed run whose metrics are damaged elsewhere than in the last line.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        run_name: str,
        config: Any,
        tracker: str = "aim",
        resume_from_update: int | None = None,
    ) -> None:
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / METRICS_FILE
        if resume_from_update is None:
            if path.exists() and path.stat().st_size:
                raise RunFolderError(
                    f"{path} already holds the metrics of a run; give another output_dir, or go on with --resume"
                )
        else:
            _keep_updates(path, resume_from_update)
        self._file = path.open("a", encoding="utf-8")
        self._sink: Sink | None = None
        self._tracker, _ = present_tracker(tracker)
        settings = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)  # type: ignore[arg-type]
        self._try("open", lambda: self._open(run_name, settings, resume_from_update))

    def log(self, kind: Kind, update: int, metrics: Mapping[str, float], *, at: float | None = None) -> None:
        """Append one row and flush it; a number that is not finite becomes null. at: its time; None: now.

        Raises:
            ValueError: A name that `metric_names` does not define, or an unknown kind.
        """
        if kind not in ("update", "evaluation"):
            raise ValueError(f"kind of a metrics row is {kind!r}; expected 'update' or 'evaluation'")
        check_names(metrics)
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        row = {"kind": kind, "update": int(update), "time": time.time() if at is None else at, **finite}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        sink = self._sink
        if sink is not None:
            known = {name: value for name, value in finite.items() if value is not None}
            self._try("log metrics", lambda: sink.log_metrics(kind, update, known))

    def log_images(
        self,
        update: int,
        name: str,
        images: Sequence[np.ndarray | Image.Image | str | Path],
        captions: Sequence[str] | None = None,
    ) -> None:
        """Put images (arrays (H, W, 3) uint8, PIL images or paths of PNGs) into the tracker, in the place of earlier ones of
        the same name and update. Without one, nothing happens: the report shows them too.
        """
        texts = [""] * len(images) if captions is None else list(captions)
        if len(texts) != len(images):
            raise ValueError(f"{len(images)} images need as many captions, got {len(texts)}")
        sink = self._sink
        if sink is not None and images:
            self._try("log images", lambda: sink.log_images(update, name, [_as_pil(i) for i in images], texts))

    def close(self) -> None:
        """Close both files; closing twice does nothing."""
        self._file.close()
        sink, self._sink = self._sink, None
        if sink is not None:
            self._try("close", sink.close)

    def __enter__(self) -> RunTracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, run_name: str, config: Mapping[str, Any], resume_from: int | None) -> None:
        folder = tracker_folder(self._tracker, self.run_dir)
        self._sink = open_sink(
            self._tracker,
            folder,
            run_name=run_name,
            config=config,
            resume=resume_from is not None,
            purge_after=resume_from,
        )

    def _try(self, what: str, action: Any) -> None:
        """A tracker is a view: whatever it raises is said once, and the run goes on with metrics.jsonl alone."""
        try:
            action()
        except Exception as error:
            self._sink = None
            warnings.warn(
                f"{self._tracker.title} could not {what} ({type(error).__name__}: {error}); the run goes on with "
                f"{METRICS_FILE} alone",
                RuntimeWarning,
                stacklevel=3,
            )


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`, in order; empty when there is no such file.

    A torn last line (the run was killed while writing it) is left out.

    Raises:
        DataError: Another line is not a JSON object.
    """
    path = Path(run_dir) / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or "update" not in row:
                raise ValueError("no object with an 'update'")
        except ValueError as error:
            if number == len(lines):
                break
            raise DataError(
                f"{path} line {number} is not a row of metrics ({error}); expected one JSON object a line. Repair or "
                "remove that line"
            ) from error
        rows.append(row)
    return rows


def _keep_updates(path: Path, last_update: int) -> None:
    """Rewrite the file, as a whole, with the rows up to and including `last_update`."""
    rows = [row for row in read_metrics(path.parent) if row["update"] <= last_update]
    with whole_file(path) as draft, draft.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())


def _as_pil(image: np.ndarray | Image.Image | str | Path) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    with Image.open(image) as opened:
        return opened.convert("RGB")
