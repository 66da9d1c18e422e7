"""`python -m ctrl_ray.compare`: every method on one task, each with the best value of its knob; one table, three pictures."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ctrl_ray import command
from ctrl_ray.config import TrainConfig
from ctrl_ray.config.fields import above, at_least, check_fields
from ctrl_ray.config.paths import absolute_paths
from ctrl_ray.config.presets import DEFAULT_PRESET, preset
from ctrl_ray.errors import ConfigError, InterruptedRunError

if TYPE_CHECKING:
    from ctrl_ray.comparison.budgets.lines import BudgetPlan
    from ctrl_ray.comparison.plan import Plan

_ADAPTER_EXAMPLE = "ctrl=runs/shapes/adapter"


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compare CTRL with every baseline on a preset's task. All methods have the same prompts, labels and noise, and the same
    number of values for their knob. Validation images choose the value. Methods are judged on noise that was never used. The
    same command continues a comparison that was stopped."""

    preset: str = DEFAULT_PRESET
    """The preset of the task and of CTRL's own run."""
    methods: tuple[str, ...] = ()
    """Names, such as ctrl dps tds. Empty: all; with --quick the ones that cost at most 32 plain samples an image."""
    seeds: Annotated[int | None, at_least(1)] = None
    """Runs of each method that is trained. None: 3, with --quick 1; of the further lines of --label-budgets 1."""
    quick: bool = False
    """Fewer images, one seed, shorter timing and none of the dearest methods: about 25 minutes on two cores."""
    adapters: tuple[str, ...] = ()
    """NAME=FOLDER: finished adapters. If NAME is a trained method, the adapter is judged instead of training that method. Any
    other name gets its own line."""
    classifier: tuple[str, ...] = ()
    """NAME=FOLDER for a control: a fitted classifier. The others are fitted on the preset's labelled images alone."""
    label_budgets: tuple[Annotated[int, at_least(1)], ...] = ()
    """Numbers of labelled images, such as 64 256 1024 4096. Instead of comparing all methods, measure what CTRL, CFG
    fine-tuning and classifier guidance reach with each number, with and without prompts."""
    held_out: bool | None = None
    """Train CTRL once more without a quarter of the prompts, and judge it on those. None: do so unless --quick is given."""
    seed: Annotated[int, at_least(0)] = 0
    """Seed of the noise."""
    output_dir: str | None = None
    """Folder of results.json, report.md, report.html, and of everything that is drawn and trained. None: runs/compare, with
    --label-budgets runs/label-budgets."""
    base_model: str | None = None
    """'shapes', a folder in the diffusers format, or a hub id, instead of the preset's."""
    data: str | None = None
    """Labelled images, a Parquet file or folder, instead of the preset's."""
    dry_run: bool = False
    """Print what would be drawn and what that takes, and stop. Nothing is loaded or fetched."""
    card: str = "A100"
    """With --dry-run, for a preset on GPUs: the kind of card to plan for."""
    num_cards: Annotated[int, at_least(1)] = 4
    """With --dry-run: how many of these cards. The paper had four."""
    teraflops: Annotated[float | None, above(0)] = None
    """With --dry-run: 10^12 operations a second that one card (on CPUs: one core) reaches in the denoiser. None: a share of
    the card's peak; cores are measured."""
    dollars_per_hour: Annotated[float | None, at_least(0)] = None
    """With --dry-run: what an hour of all cards together costs. None: ctrl_ray's built-in price of the cards."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.label_budgets and (self.adapters or self.held_out):
            raise ConfigError(
                "--label-budgets trains every adapter on its own labelled images and on all prompts; leave --adapters and "
                "--held-out out"
            )

    @property
    def folder(self) -> str:
        """Where the results go."""
        return self.output_dir or ("runs/label-budgets" if self.label_budgets else "runs/compare")


def compare(options: CompareOptions, command_line: str = "python -m ctrl_ray.compare") -> dict[str, Any]:
    """Run the comparison and write its report; returns what results.json holds ({} after a dry run).

    command_line: as the report shows it. Raises the errors of `ctrl_ray.errors`; after Ctrl-C, InterruptedRunError.
    """
    from ctrl_ray.comparison.adapters import check_given_adapter
    from ctrl_ray.runs.claim import claimed
    from ctrl_ray.runs.outputs import check_output

    if "://" in options.folder:
        raise ConfigError(f"output_dir of compare is {options.folder!r}; expected a folder; give another --output-dir")
    folder = Path(check_output(options.folder))
    config = _config(options)
    given = command.named_values("--adapters", options.adapters, _ADAPTER_EXAMPLE)
    adapters = {name: check_given_adapter(name, place, config) for name, place in given.items()}
    classifiers = command.named_values("--classifier", options.classifier, command.CLASSIFIER_EXAMPLE)
    budgets = _budget_plan(options, config) if options.label_budgets else None
    plan = _plan(options, config, adapters) if budgets is None else budgets.plan
    if options.dry_run:
        print((budgets or plan).to_text())
        print(_estimate(options, config, plan))
        return {}
    from ctrl_ray.comparison.bench import Question
    from ctrl_ray.comparison.budgets.run import run_budgets
    from ctrl_ray.comparison.classifiers import given_classifiers
    from ctrl_ray.comparison.run import run_comparison

    question = Question(
        preset=options.preset,
        config=config,
        plan=plan,
        classifiers=given_classifiers(config, classifiers),
        folder=folder,
        seed=options.seed,
        command=command_line,
    )
    with claimed(folder):
        try:
            if budgets is not None:
                return run_budgets(question, budgets, _train, _say)
            return run_comparison(question, _train, _say)
        except (InterruptedRunError, KeyboardInterrupt):
            raise InterruptedRunError(
                f"stopped; what was drawn, fitted and trained is in {folder}. Give the same command again to go on"
            ) from None


def _config(options: CompareOptions) -> TrainConfig:
    config = preset(options.preset)
    if not config.controls:
        raise ConfigError(
            f"preset {options.preset!r} has no controls, so there is nothing to compare on; expected one of a task of its own, "
            "such as shapes"
        )
    if config.latent_reduction != "sum" or config.kl_coef == 0:
        raise ConfigError(f"preset {options.preset!r} has no target that all methods could be compared with")
    given = {name: getattr(options, name) for name in ("base_model", "data") if getattr(options, name) is not None}
    return absolute_paths(dataclasses.replace(config, tracker="none", **given))


def _estimate(options: CompareOptions, config: TrainConfig, plan: Plan) -> str:
    from ctrl_ray.comparison.estimate import estimate_text, hardware, row_flops

    on = hardware(
        config,
        card=options.card,
        num_cards=options.num_cards,
        teraflops=options.teraflops,
        dollars_per_hour=options.dollars_per_hour,
    )
    return estimate_text(plan, config, on, row_flops(config))


def _budget_plan(options: CompareOptions, config: TrainConfig) -> BudgetPlan:
    from ctrl_ray.comparison.budgets.lines import make_budget_plan
    from ctrl_ray.comparison.plan import num_joint_classes

    return make_budget_plan(
        options.methods,
        options.label_budgets,
        num_steps=config.sampler.num_steps,
        num_classes=num_joint_classes(config),
        num_seeds=options.seeds,
        quick=options.quick,
        has_oracle=all(control.oracle for control in config.controls.values()),
    )


def _plan(options: CompareOptions, config: TrainConfig, adapters: dict[str, str]) -> Plan:
    from ctrl_ray.comparison.plan import make_plan, num_joint_classes

    return make_plan(
        options.methods,
        num_steps=config.sampler.num_steps,
        num_classes=num_joint_classes(config),
        num_seeds=options.seeds,
        quick=options.quick,
        adapters=adapters,
        held_out=options.held_out,
    )


def _train(config: TrainConfig, resume: bool) -> Path:
    from ctrl_ray.train import fit

    adapter = fit(config, resume=resume).adapter
    assert adapter is not None
    return adapter


def _say(line: str) -> None:
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `ctrl_ray.command` says what the exit statuses mean."""
    return command.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    import tyro

    options = tyro.cli(CompareOptions, args=argv, prog="python -m ctrl_ray.compare")
    results = compare(options, " ".join(["python -m ctrl_ray.compare", *map(shlex.quote, argv)]))
    if not results:
        return
    from ctrl_ray.comparison import report
    from ctrl_ray.comparison.budgets import report as budget_report

    shown = budget_report.terminal_text(results) if options.label_budgets else report.terminal_text(results)
    print(f"\n{shown}\nreport: {Path(options.folder) / report.PAGE}")


if __name__ == "__main__":
    sys.exit(main())
