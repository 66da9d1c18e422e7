"""The lines of a comparison over label budgets: which method, fitted on what."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ctrl_ray import embedded
from ctrl_ray.comparison.methods import METHODS
from ctrl_ray.comparison.plan import Counts, MethodPlan, Plan, training_seeds
from ctrl_ray.config import TrainConfig
from ctrl_ray.errors import ConfigError

NUM_SAMPLES = 2000
"""Samples of the pre-trained model that one line's classifier is fitted on besides, labelled by the oracle."""
FEWEST_UPDATES = 300
"""Optimizer updates of a classifier at least: few images are seen more often."""
FEWEST_IMAGES = 20
"""Labelled images of a budget at least: a tenth of them chooses the epoch, another the temperature."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the figure."""

    title: str
    method: str
    """Of METHODS."""
    with_prompts: bool = False
    """Whether the labelled images come with their prompts, else as pairs (x, y)."""
    num_samples: int = 0
    """Samples of the pre-trained model beside the labelled images."""
    once: bool = False
    """Trained with the first seed alone, unless a number of seeds is asked for: what other labels change is told apart by fewer
    runs than how many labels a method needs."""


LINES: dict[str, Line] = {
    "ctrl": Line(title="CTRL, pairs (x, y)", method="ctrl"),
    "ctrl-prompts": Line(title="CTRL, with prompts", method="ctrl", with_prompts=True, once=True),
    "ctrl-samples": Line(
        title=f"CTRL, pairs and {NUM_SAMPLES} samples of the model that the oracle labels",
        method="ctrl",
        num_samples=NUM_SAMPLES,
        once=True,
    ),
    "cfg": Line(title="CFG fine-tuning, with prompts", method="cfg", with_prompts=True),
    "cfg-pairs": Line(title="CFG fine-tuning, pairs (x, y)", method="cfg", once=True),
    "guidance": Line(title="classifier guidance, pairs (x, y)", method="classifier_guidance"),
    "guidance-prompts": Line(
        title="classifier guidance, with prompts", method="classifier_guidance", with_prompts=True, once=True
    ),
}
"""Name to line, in the order in which they are run."""

FULL, QUICK = Counts(validation=128, test=256), Counts(validation=64, test=128)


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """What is run, as plain values."""

    lines: tuple[str, ...]
    budgets: tuple[int, ...]
    """Numbers of labelled images, ascending."""
    seeds: tuple[int, ...]
    """Each draws other images, and trains once on each budget. Lines that are trained `once` have the first alone."""
    plan: Plan
    """The pre-trained model, then every line at every budget."""

    @property
    def plain(self) -> MethodPlan:
        """Of the pre-trained model."""
        return self.plan.methods[0]

    def of(self, line: str, budget: int) -> MethodPlan:
        """Of one line at one budget."""
        return next(plan for plan in self.plan.methods if plan.name == f"{line}-{budget}")

    def to_text(self) -> str:
        """What is printed before anything is drawn."""
        trained = [plan for plan in self.plan.methods if plan.method.training is not None]
        total = sum(len(plan.seeds) for plan in trained)
        head = (
            f"labelled images {', '.join(map(str, self.budgets))}; {len(self.seeds)} seeds; {total} runs of training\n"
        )
        return head + "\n".join(f"  {LINES[line].title}" for line in self.lines)


def make_budget_plan(
    methods: Sequence[str],
    budgets: Sequence[int],
    *,
    num_steps: int,
    num_classes: int,
    num_seeds: int | None = None,
    quick: bool = False,
    has_oracle: bool = True,
) -> BudgetPlan:
    """The plan of a comparison over label budgets.

    Args:
        methods: Of `LINES`' methods; () for all. With `quick` and no methods: a line of each, not all forms.
        budgets: Numbers of labelled images.
        num_steps: Denoising steps of the preset's sampler.
        num_classes: Joint classes.
        num_seeds: None: 3, with `quick` or for a line that is trained `once` 1.
        has_oracle: Whether every control has one; else no samples of the model can be labelled.

    Raises:
        ConfigError: A method without a line, too few images, or a budget twice.
    """
    known = {line.method for line in LINES.values()}
    for name in methods:
        if name not in known:
            raise ConfigError(
                f"--methods {name!r} is not a method that --label-budgets compares; expected some of {', '.join(sorted(known))}"
            )
    if min(budgets) < FEWEST_IMAGES or len(set(budgets)) < len(budgets):
        raise ConfigError(
            f"--label-budgets {' '.join(map(str, budgets))}: expected different numbers of images, {FEWEST_IMAGES} at least"
        )
    wanted = [name for name, line in LINES.items() if line.method in (methods or known)]
    if not has_oracle:
        wanted = [name for name in wanted if not LINES[name].num_samples]
    if quick and not methods:
        wanted = [name for name in wanted if not LINES[name].once]
    counts = (QUICK if quick else FULL).rounded(num_classes)
    seeds = training_seeds(num_seeds, quick)
    ordered = tuple(sorted(budgets))

    def made(name: str, title: str, method: str, seeds: tuple[int, ...]) -> MethodPlan:
        return MethodPlan(
            name=name,
            method=dataclasses.replace(METHODS[method], title=title),
            values=METHODS[method].values,
            counts=counts,
            seeds=seeds,
            num_steps=num_steps,
        )

    plans = [made("plain", METHODS["plain"].title, "plain", ())]
    plans += [
        made(
            *(f"{name}-{budget}", f"{LINES[name].title}, {budget} images", LINES[name].method),
            seeds[:1] if LINES[name].once and num_seeds is None else seeds,
        )
        for name in wanted
        for budget in ordered
    ]
    plan = Plan(methods=tuple(plans), held_out=False, quick=quick)
    return BudgetPlan(lines=tuple(wanted), budgets=ordered, seeds=seeds, plan=plan)


def fitting_config(config: TrainConfig, line: Line, budget: int, seed: int) -> TrainConfig:
    """The preset with a classifier that is to be fitted on exactly `budget` labelled images, those of this seed.

    Its three splits lie inside of the budget. CFG fine-tuning and classifiers of noised latents read the same images.
    """
    settings = config.classifier
    batches = max(1, int(settings.split[0] * (budget + line.num_samples)) // settings.batch_size)
    classifier = dataclasses.replace(
        settings,
        max_images=budget,
        num_pipeline_samples=line.num_samples,
        epochs=max(settings.epochs, math.ceil(FEWEST_UPDATES / batches)),
        ignore_prompts=not line.with_prompts,
        prompt_conditional=line.with_prompts and line.method != "cfg",
    )
    controls = {name: dataclasses.replace(control, classifier=None) for name, control in config.controls.items()}
    drawn = max(config.num_drawn_images, budget) if embedded.is_embedded(config.data) else config.num_drawn_images
    return dataclasses.replace(config, classifier=classifier, controls=controls, num_drawn_images=drawn, seed=seed)
