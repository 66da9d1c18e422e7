"""What a comparison runs, as plain values: methods, values of their knobs, seeds and numbers of images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ctrl_ray.comparison.methods import ADAPTER, METHODS, PLAIN, Method
from ctrl_ray.config import TrainConfig
from ctrl_ray.config.overrides import nearest
from ctrl_ray.errors import ConfigError
from ctrl_ray.wording import text_table

DEAR = 32.0
"""A method with a setting above this nominal cost, in plain samples, gets fewer images."""
FEWEST_A_CLASS = 16
"""Images of each joint class at least, so that a distance can be measured."""
EXACT_A_TEST_IMAGE = 4
"""Exact samples of a class that are wanted for each of its test images: two halves, and prompts that suit it less."""
MOST_POOL = 96
"""Pre-trained samples at most, for each test image."""
FIRST_TEST, FIRST_VALIDATION = 1 << 25, 1 << 24
"""Ids of the images; no run and no other command reaches them."""


@dataclass(frozen=True)
class Counts:
    """Images of one method."""

    validation: int
    """For each value of the knob."""
    test: int
    """For each adapter, or once where nothing is trained."""

    def rounded(self, num_classes: int) -> Counts:
        """Whole rounds of all joint classes, FEWEST_A_CLASS of each at least."""
        fewest = FEWEST_A_CLASS * num_classes
        return Counts(*(max(fewest, -(-n // num_classes) * num_classes) for n in (self.validation, self.test)))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much is drawn."""

    cheap: Counts
    dear: Counts
    with_dear: bool
    """Whether methods above DEAR are among the default ones."""
    held_out: bool
    """Whether CTRL is also trained without some of the prompts."""
    timing_s: float
    """Seconds after which no further pair of timings of a method is begun."""


FULL = Budget(cheap=Counts(256, 512), dear=Counts(64, 128), with_dear=True, held_out=True, timing_s=20.0)
QUICK = Budget(cheap=Counts(64, 128), dear=Counts(64, 128), with_dear=False, held_out=False, timing_s=5.0)


@dataclass(frozen=True, kw_only=True)
class MethodPlan:
    """One method, with what is drawn of it."""

    name: str
    method: Method
    values: tuple[float, ...]
    counts: Counts
    adapters: tuple[str, ...] = ()
    """Folders that are given."""
    seeds: tuple[int, ...] = ()
    """Of the runs that train it; () where nothing is trained here."""
    num_steps: int
    """Denoising steps."""

    @property
    def copies(self) -> int:
        """Policies that are judged: one where nothing is trained."""
        return max(1, len(self.adapters) + len(self.seeds))

    def cost(self, value: float) -> float:
        """Nominal cost of an image, in plain samples."""
        return self.method.cost(value, self.num_steps)

    @property
    def units(self) -> float:
        """Nominal cost of all its images, in plain samples; the test images count at the dearest value."""
        validation = self.counts.validation * sum(map(self.cost, self.values)) if self.chooses else 0.0
        return self.copies * (validation + self.counts.test * max(map(self.cost, self.values)))

    @property
    def chooses(self) -> bool:
        """Whether there is more than one value."""
        return len(self.values) > 1


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole comparison."""

    methods: tuple[MethodPlan, ...]
    """The pre-trained model first."""
    held_out: bool
    quick: bool
    timing_s: float = FULL.timing_s
    """As in `Budget`."""

    @property
    def common_test(self) -> int:
        """Test images that every method has: the noise floor falls with their number, so that distances over it compare only
        between as many."""
        return min(plan.counts.test for plan in self.methods)

    @property
    def units(self) -> float:
        """Nominal cost of all images, in plain samples."""
        return sum(plan.units for plan in self.methods)

    def to_text(self) -> str:
        """The table that is printed before anything is drawn."""
        rows = [["method", "knob", "values", "validation", "test", "policies", "nominal cost"]]
        for plan in self.methods:
            low, high = (bound(map(plan.cost, plan.values)) for bound in (min, max))
            rows.append(
                [
                    plan.method.title,
                    plan.method.knob or "–",
                    " ".join(f"{value:g}" for value in plan.values) if plan.method.knob else "–",
                    str(plan.counts.validation if plan.chooses else 0),
                    str(plan.counts.test),
                    str(plan.copies),
                    f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}",
                ]
            )
        return text_table(rows, left=(0, 1, 2))


def make_plan(
    names: Sequence[str],
    *,
    num_steps: int,
    num_classes: int,
    num_seeds: int | None = None,
    quick: bool = False,
    adapters: Mapping[str, str] | None = None,
    held_out: bool | None = None,
) -> Plan:
    """The plan of a comparison.

    Args:
        names: Of METHODS; () for all (with `quick`: all that are not dear). The pre-trained model is always there.
        num_steps: Denoising steps of the preset's sampler.
        num_classes: Joint classes.
        num_seeds: Runs of each trained method; None: 3, with `quick` 1.
        adapters: Folder by name. Of a trained method's name it takes the place of its runs; another is a line of its own.
        held_out: Train CTRL also without some of the prompts; None: not with `quick`.

    Raises:
        ConfigError: An unknown method, a name twice, or an adapter under the name of a method that trains nothing.
    """
    given = dict(adapters or {})
    budget = QUICK if quick else FULL
    _check(names, given)

    def made(name: str, method: Method) -> MethodPlan:
        trains = method.training is not None and name not in given
        dear = max(method.cost(value, num_steps) for value in method.values) > DEAR
        return MethodPlan(
            name=name,
            method=method,
            values=method.values,
            counts=(budget.dear if dear else budget.cheap).rounded(num_classes),
            adapters=(given[name],) if name in given else (),
            seeds=training_seeds(num_seeds, quick) if trains else (),
            num_steps=num_steps,
        )

    every = {name: made(name, method) for name, method in METHODS.items()}
    chosen = list(names) or [
        name for name, plan in every.items() if budget.with_dear or max(map(plan.cost, plan.values)) <= DEAR
    ]
    plans = [every[name] for name in METHODS if name in {PLAIN, *chosen, *given}]
    plans += [made(name, dataclasses.replace(ADAPTER, title=name)) for name in given if name not in METHODS]
    wants_held_out = budget.held_out if held_out is None else held_out
    trains_ctrl = any(plan.name == "ctrl" and plan.seeds for plan in plans)
    return Plan(methods=tuple(plans), held_out=wants_held_out and trains_ctrl, quick=quick, timing_s=budget.timing_s)


def training_seeds(num_seeds: int | None, quick: bool) -> tuple[int, ...]:
    """Of the runs of a trained method; None: three, with `quick` one."""
    return tuple(range(num_seeds or (1 if quick else 3)))


def num_joint_classes(config: TrainConfig) -> int:
    """Of all controls together."""
    return math.prod(control.num_classes for control in config.controls.values())


def _check(names: Sequence[str], adapters: Mapping[str, str]) -> None:
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"--methods {name!r} is not a method{nearest(name, METHODS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"--methods {' '.join(names)} names a method twice; expected each once")
    for name in adapters:
        if name in METHODS and METHODS[name].training is None:
            trained = ", ".join(key for key, method in METHODS.items() if method.training is not None)
            raise ConfigError(
                f"--adapters {name}=… is the name of a method that trains nothing; expected one of {trained}, or a name of "
                "your own"
            )


def held_out_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    """A quarter of the prompts: one of each four neighbours, another one each time, so that a list that is ordered by its words
    loses none of them. ConfigError where there are fewer than four."""
    unique = list(dict.fromkeys(prompts))
    if len(unique) < 4:
        raise ConfigError(
            f"{len(unique)} prompts are too few to hold a quarter of them back from training; expected four at least: give "
            "--held-out False"
        )
    return tuple(unique[start + (start // 4 + 3) % 4] for start in range(0, len(unique) - 3, 4))
