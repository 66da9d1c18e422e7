"""Stage 1: fit p(y|x,c) under Ray Train and calibrate it. The driver's side; the workers' is `classifiers.worker`."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrl_ray.classifiers.checks import check_fit
from ctrl_ray.classifiers.classifier import SETTINGS
from ctrl_ray.classifiers.examples import SamplePipeline
from ctrl_ray.classifiers.soundness import doubts
from ctrl_ray.classifiers.worker import FitJob, fit_worker
from ctrl_ray.cluster.connection import connected
from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.channel import Notifier
from ctrl_ray.distributed.environment import worker_environment
from ctrl_ray.distributed.rows import Notice, Stopping
from ctrl_ray.distributed.worker_group import WorkerGroup, new_channel, run_workers
from ctrl_ray.embedded import is_embedded
from ctrl_ray.errors import ConfigError, InterruptedRunError, ModelError, RunFolderError
from ctrl_ray.offline.reading import OnBadRow, side_file
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.runs.claim import claimed
from ctrl_ray.runs.outputs import check_output


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """What a fit left behind."""

    folder: Path
    """Holds `model.safetensors`, `classifier.json` and `reliability.png`."""
    before: Mapping[str, float]
    """Accuracy, NLL, Brier and ECE on the temperature split with temperature 1 (`calibration.calibration_metrics`)."""
    after: Mapping[str, float]
    """The same at the fitted temperature."""
    temperature: float
    """Logits are divided by it."""
    best_epoch: int
    """The epoch that was kept, from 1."""
    num_rows: Mapping[str, int]
    """Rows of each split, and how many rows were judged."""
    doubts: tuple[str, ...] = ()
    """What these figures give to doubt, a sentence each (`classifiers.soundness`)."""


def fit_classifier(
    config: TrainConfig,
    control: str,
    *,
    output_dir: str | Path,
    sample_pipeline: SamplePipeline | None = None,
    on_bad_row: OnBadRow = "error",
    overwrite: bool = False,
    quiet: bool = False,
    storage_path: str | None = None,
    equal_classes: int | None = None,
) -> FitResult:
    """Fit and calibrate the classifier of one control of `config`, and write it into `output_dir`.

    Runs `config.classifier.num_workers` Ray Train workers (Ray is started when it is not running), with the CPUs,
    devices and threads of `config.scaling`. They decode the images once into a folder below `output_dir`, which must be
    on storage that all of them share and is removed at the end; then they fit. With `storage_path` the one worker may be
    on another host: it decodes into a temporary folder of its own. The result depends on the seed, not on
    the number of workers (up to rounding).

    Args:
        config: The run; `data`, `base_model`, `seed`, `classifier`, `scaling` and the control are used.
        control: Name of the control.
        output_dir: Local folder to write.
        sample_pipeline: Gives samples of the pre-trained pipeline, see `examples.SamplePipeline`; it travels to the
            workers, so it loads its models when first called. Needed when `classifier.num_pipeline_samples` > 0.
        on_bad_row: 'error', or 'skip' to set bad rows of the data set aside.
        overwrite: Replace a classifier that `output_dir` already holds.
        quiet: Print no progress.
        storage_path: Where the workers leave the classifier for this process to fetch (any path that pyarrow.fs opens),
            when they may run on hosts that do not have `output_dir`.
        equal_classes: Choose thresholds that give so many classes equal shares of the pipeline's samples (without them: of
            the decoded images); the control has an oracle and no thresholds then.

    Raises:
        ConfigError: The control, its classes, or a combination of settings cannot be fitted.
        DataError, ModelError: The data set, or the pipeline, cannot be read.
        RunFolderError: `output_dir` already holds a classifier, or another process writes there now.
        NonFiniteError: The loss became NaN or infinite.
        ResourceError: There was no room for the workers for `scaling.placement_timeout_s`.
        InterruptedRunError: SIGINT or SIGTERM came; nothing of the fit is kept.
    """
    folder = Path(output_dir).expanduser().resolve()
    check_fit(config, control, has_sampler=sample_pipeline is not None, equal_classes=equal_classes)
    if (folder / SETTINGS).exists() and not overwrite:
        raise RunFolderError(f"{folder} already holds a classifier; choose another output folder, or give --overwrite")
    if storage_path is not None and config.classifier.num_workers > 1:
        raise ConfigError(
            f"classifier.num_workers is {config.classifier.num_workers}, but they would share decoded images in a local "
            f"folder, and the run is written to {storage_path}; set classifier.num_workers to 1, or fit the classifier first "
            "(python -m ctrl_ray.classify) and give it by --control"
        )
    if on_bad_row == "skip" and config.data and not is_embedded(config.data):
        remedy = "copy the data set to where you can write, or set on_bad_row to error"
        check_output(side_file(config.data), "--on-bad-row skip", kind="file", remedy=remedy)
    with claimed(folder), connected(), _scratch(folder) as scratch:
        job = FitJob(
            config=config,
            control=control,
            image_size=load_backbone(config.base_model, config.base_revision, config.sampler).image_size(),
            folder=str(scratch / "examples") if storage_path is None else None,
            sample_pipeline=sample_pipeline,
            on_bad_row=on_bad_row,
            equal_classes=equal_classes,
        )
        _run(job, storage_path or str(scratch), folder, quiet)
    return read_result(folder)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    """A folder with 'examples' in it that is gone afterwards, and those that killed fits have left."""
    for left in folder.glob(".fit-*"):
        shutil.rmtree(left, ignore_errors=True)
    scratch = folder / f".fit-{uuid.uuid4().hex[:12]}"
    (scratch / "examples").mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def read_result(folder: str | Path) -> FitResult:
    """The metrics that a fit stored in its classifier folder."""
    path = Path(folder)
    try:
        settings = json.loads((path / SETTINGS).read_text(encoding="utf-8"))
        metrics = settings["calibration"]
        return FitResult(
            folder=path,
            before=metrics["before"],
            after=metrics["after"],
            temperature=settings["temperature"],
            best_epoch=metrics["best_epoch"],
            num_rows=metrics["num_rows"],
            doubts=doubts(settings["classes"], settings["temperature"], metrics),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path / SETTINGS} lacks the metrics of a fit ({type(error).__name__}: {error})") from error


def _run(job: FitJob, storage_path: str, folder: Path, quiet: bool) -> None:
    def on_row(row: Any) -> None:
        match row:
            case Notice() if not quiet:
                print(row.text, flush=True)
            case Stopping():
                raise KeyboardInterrupt  # a fit that is not finished leaves nothing

    channel, scaling = new_channel(), job.config.scaling
    group = WorkerGroup(
        worker=functools.partial(fit_worker, dataclasses.replace(job, say=Notifier(channel))),
        channel=channel,
        scaling=scaling,
        num_workers=job.config.classifier.num_workers,
        storage_path=storage_path,
        # a name of its own: Ray Train would go on with an earlier fit of the same name
        run_name=f"classifier-{job.control}-{uuid.uuid4().hex[:8]}",
        environment=worker_environment(use_gpu=scaling.use_gpu, num_threads=scaling.num_threads),
    )
    try:
        result = run_workers(group, on_row)
    except KeyboardInterrupt:
        raise InterruptedRunError(
            f"stopped; the classifier of {job.control} was not fitted, and nothing of the fit is kept. Give the same command "
            "again (train and tune: with --resume, where their output folder is still there)"
        ) from None
    assert result.checkpoint is not None
    with result.checkpoint.as_directory() as written:
        # the settings last: where they are, the classifier is whole
        shutil.copytree(written, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SETTINGS))
        shutil.copyfile(Path(written) / SETTINGS, folder / SETTINGS)
    result.filesystem.delete_dir(result.path)
