"""`python -m ctrl_ray.tune tune_spaces/kl_guidance.py`: many runs, to find out how hard to pull."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from ctrl_ray import command
from ctrl_ray.command import stoppable
from ctrl_ray.config import TrainConfig

if TYPE_CHECKING:
    from ctrl_ray.tuning.results.trials import SweepTrial
    from ctrl_ray.tuning.space import Space


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepResult:
    """What a sweep gives back. `print` and a notebook's cell show it as the table of its trials."""

    folder: Path
    trials: tuple[SweepTrial, ...]
    knobs: tuple[str, ...]
    """Dotted paths of the settings that differ between trials."""
    best: SweepTrial | None
    """The finished trial with the best value of the first METRIC; None when no trial finished."""
    adapter: Path | None
    """The best trial's, exported."""
    report: Path
    figures: Mapping[str, Path]
    """Title to PNG."""

    def __str__(self) -> str:
        from ctrl_ray.tuning.results.trials import format_trials

        return format_trials(self.trials, self.knobs)

    def __repr__(self) -> str:
        return str(self)


def sweep(
    space: str | Path | Space,
    *,
    num_samples: int | None = None,
    max_concurrent: int | Literal["auto"] = "auto",
    output_dir: str | None = None,
    resume: bool = False,
    base: TrainConfig | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
) -> SweepResult:
    """Run a sweep and write its report. `python -m ctrl_ray.tune` does the same.

        space = ctrl_ray.Space(name="mine", values={"kl_coef": ray.tune.loguniform(0.5, 2.0)})
        result = ctrl_ray.sweep(space, num_samples=4)
        print(result, result.best, result.report)

    space: A sweep file, or a `Space`. num_samples: Trials to draw, 16 by default (a grid is run through once).
    max_concurrent: At most this many trials at a time; 'auto': as many as have room. output_dir: runs/sweep-NAME by default.
    resume: Go on with the sweep in output_dir. base: The config that trials start from, instead of the space's preset.
    on_bad_row: As for `ctrl_ray.fit`.
    Raises the errors of `ctrl_ray.errors`; after Ctrl-C InterruptedRunError. A trial that fails does not end the sweep.
    """
    from ctrl_ray.tuning.space import base_of, check_request, check_space, load_space

    loaded = load_space(space)
    check_request(num_samples, max_concurrent)
    start = check_space(loaded, base_of(loaded) if base is None else base)

    from ctrl_ray.cluster.connection import connected
    from ctrl_ray.cluster.resources import check_cluster
    from ctrl_ray.cluster.shared_storage import check_shared
    from ctrl_ray.driver.stages import prepare_classifiers, rewards_of
    from ctrl_ray.planning.preflight import preflight
    from ctrl_ray.policy.pipeline_sampler import PipelineSampler
    from ctrl_ray.runs.folder import RunFolder
    from ctrl_ray.tuning.sweep_folder import SweepFolder

    folder = SweepFolder.at(output_dir or f"runs/sweep-{loaded.name}")
    checked = preflight(dataclasses.replace(start, output_dir=str(folder.path)))
    for line in checked.doubts:
        print(line, flush=True)

    def begun() -> bool:
        return resume or folder.has_begun(checked.asked)

    with (
        folder.claimed(loaded, checked.asked, num_samples, resume=resume) as wanted,
        stoppable(str(folder.path), begun),
    ):
        print(f"sweep      {folder.name}, written to {folder.path}", flush=True)
        with connected():
            check_cluster(checked.config)
            own = RunFolder(str(folder.path))
            check_shared(checked.config, own)
            sampler = PipelineSampler(checked.config, checked.prompts)
            checked = prepare_classifiers(checked, own, sampler, on_bad_row)
            with rewards_of(checked.config) as rewards:
                return _run_and_report(
                    loaded, checked, folder, rewards, wanted, max_concurrent, on_bad_row, resume=resume
                )


def _run_and_report(
    space: Space,
    checked: Any,
    folder: Any,
    rewards: Any,
    num_samples: int,
    max_concurrent: int | Literal["auto"],
    on_bad_row: Literal["error", "skip"],
    *,
    resume: bool,
) -> SweepResult:
    from ctrl_ray.tuning.final_report import conclude, sample_before
    from ctrl_ray.tuning.follower import SweepFollower
    from ctrl_ray.tuning.results.report import write_sweep_report
    from ctrl_ray.tuning.run_trials import room_for_trials, run_trials
    from ctrl_ray.tuning.trial import TrialJob
    from ctrl_ray.wording import duration

    started = time.monotonic()
    sample_before(checked, folder, rewards)
    num_concurrent = room_for_trials(checked.config, max_concurrent)
    print(f"trials     {num_concurrent} at a time", flush=True)
    job = TrialJob(base=checked.config, rewards=rewards, folder=str(folder.path), on_bad_row=on_bad_row)
    with _tracking(checked.config, folder, resume) as tracker:
        follower = SweepFollower(folder.path, checked.config, list(space.knobs), tracker)
        trials = run_trials(space, job, folder, follower, num_samples=num_samples, num_concurrent=num_concurrent)
        facts = {"time of this session's trials": duration(time.monotonic() - started)}
        findings = conclude(space, checked, folder, rewards, trials, facts)
        page, figures = write_sweep_report(folder.path, findings)
        if tracker is not None:
            tracker.log_images("sweep", figures)
    return SweepResult(
        folder=folder.path,
        trials=tuple(trials),
        knobs=tuple(space.knobs),
        best=findings.best,
        adapter=Path(findings.adapter) if findings.adapter else None,
        report=page,
        figures=figures,
    )


@contextmanager
def _tracking(config: TrainConfig, folder: Any, resume: bool) -> Any:
    """The one writer of the sweep's tracker; None where there is none."""
    from ctrl_ray.reporting.sinks import present_tracker, tracker_folder
    from ctrl_ray.tuning.results.tracking import SweepTracker

    chosen, line = present_tracker(config.tracker)
    if line:
        print(line, flush=True)
    if chosen.kind == "none":
        yield None
        return
    own = tracker_folder(chosen, folder.path)
    settings = dataclasses.asdict(config)
    tracker = SweepTracker(chosen, own, experiment=folder.name, config=settings, resume=resume)
    try:
        yield tracker
    finally:
        tracker.close()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """Run a sweep: many trials, a table while they run, a report at the end."""

    file: Annotated[str, tyro.conf.Positional]
    """The sweep file, such as tune_spaces/kl_guidance.py. It has PRESET, METRIC, MODE and space(), and may have
    points(), scheduler() and search()."""
    num_samples: int | None = None
    """How many trials to draw. None: 16. A grid runs each of its points once."""
    max_concurrent: int | Literal["auto"] = "auto"
    """At most this many trials at a time. auto: as many as have room beside the reward pool."""
    output_dir: str | None = None
    """Folder of the sweep. None: runs/sweep-NAME."""
    resume: bool = False
    """Go on with the sweep in output_dir: finished trials stay, unfinished ones go on from their checkpoints, failed
    ones are tried again."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Where a classifier is fitted: 'error' stops at the first row of data that cannot be used, 'skip' sets it aside in
    DATA.bad_rows.jsonl."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `ctrl_ray.command` says what the exit statuses mean."""
    return command.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    started = time.monotonic()
    arguments = tyro.cli(Arguments, args=argv, prog="python -m ctrl_ray.tune")
    result = sweep(
        arguments.file,
        num_samples=arguments.num_samples,
        max_concurrent=arguments.max_concurrent,
        output_dir=arguments.output_dir,
        resume=arguments.resume,
        on_bad_row=arguments.on_bad_row,
    )
    print(f"\nreport   {result.report}")
    if result.best is None:
        print("error: no trial finished; their errors are in the table", file=sys.stderr)
        return command.FAILED
    print(f"best     trial {result.best.name}\nadapter  {result.adapter}")
    print(f"time     {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
