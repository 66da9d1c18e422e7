"""The trackers by name: what a run's curves and pictures are written to."""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ctrl_ray.config.tracker import Tracker, parse_tracker
from ctrl_ray.reporting.aim_sink import RUN_FILE, AimSink
from ctrl_ray.reporting.tensorboard_sink import TensorBoardSink


class Sink(Protocol):
    """A run in a tracker."""

    def log_metrics(self, kind: str, update: int, metrics: Mapping[str, float]) -> None:
        """Every metric at an update; kind: 'update' or 'evaluation'."""

    def log_images(self, update: int, name: str, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Images with their captions at an update."""

    def close(self) -> None:
        """Write what is left."""


def present_tracker(text: str) -> tuple[Tracker, str | None]:
    """The tracker that a setting names, and a line for people where another stands in for it: Aim has no wheels for newer
    Pythons, and TensorBoard's event files take its place."""
    tracker = parse_tracker(text)
    if tracker.kind != "aim" or importlib.util.find_spec("aim") is not None:
        return tracker, None
    return Tracker("tensorboard", None), (
        f"tracker    Aim is not installed (it has no wheels for Python 3.13 and later; this is {platform.python_version()}): "
        "curves and pictures go to TensorBoard's event files. --tracker tensorboard or none says so"
    )


def tracker_folder(tracker: Tracker, run_dir: Path) -> Path:
    """What a tracker writes beside a run."""
    return run_dir / tracker.kind


def open_sink(
    tracker: Tracker,
    folder: Path,
    *,
    run_name: str,
    config: Mapping[str, Any],
    resume: bool,
    purge_after: int | None,
    member: str | None = None,
    experiment: str | None = None,
    knobs: Mapping[str, Any] | None = None,
) -> Sink | None:
    """The sink of a run; None where there is to be none.

    folder: `tracker_folder`. resume: go on with the run that is there. purge_after: what was written of later updates comes
    again; None: nothing does. member: of several runs in the folder. config, experiment, knobs: for Aim, see `AimSink`.
    """
    if tracker.kind == "none":
        return None
    if tracker.kind == "tensorboard":
        return TensorBoardSink(folder if member is None else folder / member, purge_after=purge_after)
    return AimSink(
        tracker.repo or folder,
        run_file=folder / (RUN_FILE if member is None else f"{RUN_FILE}_{member}"),
        run_name=run_name,
        config=config,
        resume=resume,
        experiment=experiment,
        knobs=knobs,
    )
