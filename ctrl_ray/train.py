"""`python -m ctrl_ray.train`: from labelled images to a controlled model."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ctrl_ray import command
from ctrl_ray.command import stoppable
from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.config.json import read_train_config
from ctrl_ray.config.presets import DEFAULT_PRESET, PRESETS, preset
from ctrl_ray.config.tracker import parse_tracker
from ctrl_ray.errors import ConfigError, InterruptedRunError
from ctrl_ray.wording import duration, no_file

_END_METRICS = (
    *("accuracy", "joint_accuracy", "macro_f1", "prompt_fidelity", "clip_score", "brisque"),
    *("kl", "gap", "diversity"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What a finished run gives back."""

    folder: Path
    """Where it was written."""
    adapter: Path | None
    """The exported adapter; None after a dry run."""
    summary: dict[str, Any]
    """before / after, as in report/summary.json, and report, the page's path; empty after a dry run."""


def fit(
    config: TrainConfig,
    *,
    resume: bool = False,
    dry_run: bool = False,
    machines: str | None = None,
    refit_classifier: bool = False,
    on_bad_row: Literal["error", "skip"] = "error",
) -> Run:
    """Run all of CTRL: classifier, fine-tuning, evaluation, export, report. `python -m ctrl_ray.train` does the same.

        config = dataclasses.replace(ctrl_ray.preset("shapes"), output_dir="runs/stronger", kl_coef=0.5)
        run = ctrl_ray.fit(config)
        run.summary["after"]["accuracy"]

    resume: Go on from the last checkpoint under `config.output_dir`. dry_run: Check the settings, print the plan and stop.
    machines: Plan a dry run for these machines, which need not be there ('4x8x80GB', see `ctrl_ray.planning.machines`).
    refit_classifier: Fit the classifiers from data even where the config names a fitted one. on_bad_row: What becomes of a
    row of the data set that cannot be used, where a classifier is fitted: 'skip' sets it aside, in DATA.bad_rows.jsonl.
    Raises the errors of `ctrl_ray.errors`; after Ctrl-C, when a checkpoint is written, InterruptedRunError.
    """
    from ctrl_ray.cluster.connection import connected, ray_job
    from ctrl_ray.cluster.resources import check_cluster
    from ctrl_ray.cluster.shared_storage import check_shared
    from ctrl_ray.driver.pre_trained import sample_pre_trained
    from ctrl_ray.driver.stages import (
        evaluate_and_report,
        fine_tune,
        prepare_classifiers,
        rewards_of,
    )
    from ctrl_ray.planning.assumed import Assumed, assumed
    from ctrl_ray.planning.machines import stated_machines
    from ctrl_ray.planning.preflight import preflight
    from ctrl_ray.policy.pipeline_sampler import PipelineSampler
    from ctrl_ray.reporting.sinks import present_tracker
    from ctrl_ray.runs.folder import ADAPTER, CHECKPOINTS, RunFolder, below
    from ctrl_ray.runs.outputs import check_output

    started, job = time.monotonic(), ray_job()
    if machines is not None and not dry_run:
        raise ConfigError(f"--machines {machines} states machines to plan for; give it with --dry-run only")
    if machines is None:  # else the run will be started elsewhere
        check_output(config.output_dir)
        repo = parse_tracker(config.tracker).repo
        if repo and "://" not in repo:
            check_output(repo, "--tracker")
    folder = RunFolder(config.output_dir)
    plan = assumed(config, machines) if dry_run else Assumed(config, machines, False, [])
    stated = None if plan.machines is None else stated_machines(plan.machines)
    checked = preflight(
        plan.config,
        refit_classifier=refit_classifier,
        with_estimate=dry_run,
        stated=stated,
        without_data=plan.without_data,
    )
    _, stands_in = present_tracker(config.tracker)
    print("\n".join([*plan.lines, checked.summary, *([stands_in] if stands_in else [])]), flush=True)
    if dry_run:
        return Run(folder=folder.local, adapter=None, summary={})

    def begun() -> bool:
        return resume or folder.has_begun(checked.asked)

    with folder.claimed(checked.asked, resume=resume), stoppable(folder.storage_path, begun):
        print(f"run        {folder.name}, written to {folder.storage_path}", flush=True)
        if job is not None:
            print(job.hint, flush=True)
        with connected():
            check_cluster(checked.config)
            check_shared(checked.config, folder)
            folder.prepare(checked.asked, resume=resume)
            checked = prepare_classifiers(checked, folder, PipelineSampler(checked.config, checked.prompts), on_bad_row)
            with rewards_of(checked.config) as rewards:
                pre_trained = sample_pre_trained(checked, folder, rewards)
                trained = fine_tune(
                    checked, folder, rewards, resume=resume, pre_trained=pre_trained, on_bad_row=on_bad_row
                )
                if trained.stopped is not None and trained.stopped.kind == "asked":
                    raise InterruptedRunError(
                        f"stopped after update {trained.updates_done} of {checked.config.num_updates}; a checkpoint is in "
                        f"{below(folder.storage_path, CHECKPOINTS)}. Go on with the same command and --resume"
                    )
                facts = {"time until the evaluation": duration(time.monotonic() - started)}
                final = evaluate_and_report(checked, folder, rewards, trained, facts, pre_trained=pre_trained)
    summary = {
        "before": final.before,
        "after": final.after,
        "kl_noise_floor": final.kl_noise_floor,
        "report": str(final.report),
    }
    _print_end(folder.local, summary, checked.config, checked.prompts[0], time.monotonic() - started)
    return Run(folder=folder.local, adapter=folder / ADAPTER, summary=summary)


def _print_end(folder: Path, summary: dict[str, Any], config: TrainConfig, prompt: str, seconds: float) -> None:
    from ctrl_ray.driver.next_steps import next_lines, next_steps
    from ctrl_ray.policy.class_loras import CLASSES_FOLDER
    from ctrl_ray.reporting.summary_text import closing_lines, format_summary

    print(f"\n{format_summary(summary, _END_METRICS)}")
    if lines := closing_lines(summary):
        print("\n" + "\n".join(lines))
    print(f"\nreport   {summary['report']}\nadapter  {folder / 'adapter'}")
    classes = folder / "adapter" / CLASSES_FOLDER
    if classes.is_dir():
        print(f"classes  {classes}: LoRA files for plain diffusers; how, in {folder / 'adapter' / 'README.md'}")
    print(f"time     {seconds / 60:.1f} minutes\n")
    print("\n".join(next_lines(next_steps(config, folder / "adapter", prompt))))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    """CTRL: teach a pre-trained diffusion model one more control."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The run."""
    resume: bool = False
    """Go on from the last checkpoint in output_dir."""
    dry_run: bool = False
    """Check everything that needs no cluster, print the plan and stop."""
    machines: str | None = None
    """With --dry-run: plan for these machines, which need not be there. MACHINESxGPUSxMEMORY, such as 4x8x80GB or 1x1xL40S;
    several kinds: 3x8x80GB,1x4x80GB."""
    refit_classifier: bool = False
    """Fit the classifiers from data even where the settings name a fitted one."""
    on_bad_row: Literal["error", "skip"] = "error"
    """Where a classifier is fitted: 'error' stops at the first row of data that cannot be used, 'skip' sets it aside in
    DATA.bad_rows.jsonl."""


_ALSO = """Also: --preset {presets} (default: {default}); --config FILE.json (start from the config.json of a run);
--control NAME=CLASSIFIER_FOLDER (train this control instead of the preset's; you can give it more than once)."""


def parse(argv: Sequence[str]) -> Arguments:
    """Flags → Arguments. The base of the config (--preset, --config, --control) is read first, then typed overrides."""
    rest, name, file, controls = [], DEFAULT_PRESET, None, []
    flags = iter(argv)
    for flag in flags:
        key, has_value, value = flag.partition("=")
        if key in ("--preset", "--config", "--control"):
            value = value if has_value else next(flags, "")
            if not value:
                raise ConfigError(f"{key} needs a value")
            if key == "--preset":
                name = value
            elif key == "--config":
                file = Path(value)
            else:
                controls.append(value)
        else:
            rest.append(flag)
    default = preset(name)
    if file is not None:
        if not file.is_file():
            raise ConfigError(f"--config {file} {no_file(file)}; give a config.json that a run wrote")
        default = read_train_config(file)
    if controls:
        default = dataclasses.replace(default, controls=dict(_parse_control(text) for text in controls))
    description = f"{Arguments.__doc__}\n\n{_ALSO.format(presets='|'.join(PRESETS), default=DEFAULT_PRESET)}"
    return tyro.cli(
        Arguments,
        args=_with_values(rest),
        default=Arguments(config=default),
        description=description,
        prog="python -m ctrl_ray.train",
    )


_SWITCHES = {"--scaling.gradient-checkpointing", "--estimator.keep-graphs"}
"""Settings that are true, false or 'auto'."""


def _with_values(flags: Sequence[str]) -> list[str]:
    """The flags, with True or False after a switch that has no value: what may be 'auto' is one too, alone or with no-."""
    given: list[str] = []
    for index, flag in enumerate(flags):
        name = flag.replace("_", "-") if flag.startswith("--") else flag
        positive = name.replace(".no-", ".")
        following = flags[index + 1] if index + 1 < len(flags) else "--"
        if positive in _SWITCHES and (name != positive or following.startswith("--")):
            given += [positive, str(name == positive)]
        elif given and given[-1] in _SWITCHES and flag.lower() in ("true", "false"):
            given.append(flag.capitalize())
        else:
            given.append(positive if positive in _SWITCHES else flag)
    return given


def _parse_control(text: str) -> tuple[str, ControlConfig]:
    name, _, folder = text.partition("=")
    if not name or not folder:
        raise ConfigError(f"--control {text!r} is not NAME=CLASSIFIER_FOLDER; e.g. --control jpeg_size=runs/classifier")
    return name, ControlConfig(classifier=folder)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `ctrl_ray.command` says what the exit statuses mean."""
    return command.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    arguments = parse(argv)
    fit(
        arguments.config,
        resume=arguments.resume,
        dry_run=arguments.dry_run,
        machines=arguments.machines,
        refit_classifier=arguments.refit_classifier,
        on_bad_row=arguments.on_bad_row,
    )


if __name__ == "__main__":
    sys.exit(main())
