"""The cases that `python -m ctrl_ray.verify` runs: a problem, an estimator, how long to train, what must be reached."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ctrl_ray.exact.problems import (
    ComponentReward,
    GaussianReward,
    LogisticReward,
    Mixture,
    Problem,
    Sampler,
)
from ctrl_ray.exact.prompts import MarginalReward, PromptRule

GAUSSIAN = Mixture((0.0,), (1.0,), (1.0,))
TWO_MODES = Mixture((-2.0, 2.0), (0.5, 0.5), (0.5, 0.5))
THREE_MODES = Mixture((-2.5, 0.3, 2.0), (0.3, 0.6, 0.4), (0.5, 0.2, 0.3))

PromptName = Literal["strict", "mild"]

PROMPT_RULES: dict[PromptName, PromptRule] = {
    "strict": PromptRule(
        share=0.5, mixture=dataclasses.replace(TWO_MODES, weights=(0.65, 0.35)), reward=LogisticReward(1.0, -2.0)
    ),
    "mild": PromptRule(
        share=0.5, mixture=dataclasses.replace(TWO_MODES, weights=(0.35, 0.65)), reward=LogisticReward(1.0, 2.0)
    ),
}
"""Two prompts whose labels have thresholds of their own: p(y|x,c) = sigmoid(x - 2) and sigmoid(x + 2)."""


@dataclass(frozen=True)
class Bar:
    """How far a quantity may be from its exact value."""

    quantity: Literal["mean", "std", "p_positive", "kl", "objective", "tv_to_optimum"]
    tolerance: float
    """Absolute; of the objective: relative."""


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long a case is trained."""

    num_updates: int = 150
    batch_size: int = 2048
    learning_rate: float = 0.05
    num_nodes: int = 25
    """Nodes of a step's push."""
    shared_steps: bool = False
    """One push for all steps; then no exact answer is known."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row group of the table."""

    problem: Problem
    estimator: str = "full"
    estimator_steps: int = 0
    bars: tuple[Bar, ...] = ()
    coordinates: tuple[int, ...] = (0,)
    """Coordinates that are looked at."""
    controlled_from: int = 0
    """First step that the exact optimum controls: last_k reaches the optimum of its last steps."""
    latent_reduction: Literal["sum", "mean"] = "sum"
    effort: Effort = dataclasses.field(default_factory=Effort)
    seed: int = 0
    truth: Problem | None = None
    """The problem with the right reward, where this case's own reward is wrong by a known amount."""

    @property
    def title(self) -> str:
        """Unique within a set of cases."""
        return f"{self.problem.name} · {self.estimator}"

    @property
    def compared(self) -> tuple[int, ...]:
        """The coordinates that are compared one by one; repeats are compared as one."""
        return self.coordinates[:1] if self.problem.repeated else self.coordinates


GAUSSIAN_BARS = (Bar("mean", 0.01), Bar("std", 0.01), Bar("objective", 0.005))
MIXTURE_BARS = (
    *(Bar("mean", 0.02), Bar("std", 0.02), Bar("p_positive", 0.005)),
    *(Bar("tv_to_optimum", 0.01), Bar("objective", 0.005)),
)
REINFORCE_BARS = (Bar("mean", 0.05), Bar("std", 0.05))


def gaussian(estimator: str = "full", **changes: object) -> Case:
    """T1: N(0, 1) as the data, a Gaussian reward."""
    problem = Problem(name="T1 gaussian", mixture=GAUSSIAN, rewards=(GaussianReward(2.0, 0.5),))
    return _case(problem, estimator, GAUSSIAN_BARS, **changes)


def component(**changes: object) -> Case:
    """T3: two modes, the reward is the posterior of one of them."""
    problem = Problem(name="T3 component", mixture=TWO_MODES, rewards=(ComponentReward(TWO_MODES, 1),))
    return _case(problem, "full", (Bar("mean", 0.01), Bar("std", 0.01)), **changes)


def logistic(strength: float = 1.0, num_steps: int = 50, estimator: str = "full", **changes: object) -> Case:
    """T4: two modes, a logistic reward that prefers one of them."""
    problem = Problem(
        name=f"T4 logistic, gamma {strength:g}, {num_steps} steps",
        mixture=TWO_MODES,
        rewards=(LogisticReward(1.0),),
        guidance_strengths=(strength,),
        sampler=Sampler(num_steps=num_steps),
    )
    return _case(problem, estimator, MIXTURE_BARS, **changes)


def three_modes(slope: float, num_steps: int, **changes: object) -> Case:
    """Three components of unequal weights and widths, a steeper logistic reward."""
    problem = Problem(
        name=f"mixture of 3, slope {slope:g}, {num_steps} steps",
        mixture=THREE_MODES,
        rewards=(LogisticReward(slope),),
        sampler=Sampler(num_steps=num_steps),
    )
    return _case(problem, "full", MIXTURE_BARS, **changes)


def two_controls(**changes: object) -> Case:
    """T5: two coordinates, each with its own reward and strength."""
    problem = Problem(
        name="T5 two controls",
        mixture=GAUSSIAN,
        rewards=(GaussianReward(2.0, 0.5), LogisticReward(2.0)),
        guidance_strengths=(1.0, 2.0),
        dimension=2,
    )
    return _case(problem, "full", (Bar("mean", 0.01), Bar("std", 0.01)), coordinates=(0, 1), **changes)


def dimension(size: int, **changes: object) -> Case:
    """T6: T1 on one of `size` independent coordinates."""
    problem = Problem(
        name=f"T6 dimension {size}", mixture=GAUSSIAN, rewards=(GaussianReward(2.0, 0.5),), dimension=size
    )
    return _case(problem, "full", (Bar("mean", 0.01), Bar("std", 0.01)), **changes)


def prompt_dependent(prompt: PromptName, *, with_prompt: bool, **changes: object) -> Case:
    """T8: y depends on the prompt for a given x too, and the reward is log p(y|x,c), or log p̄(y|x) of a classifier that was
    fitted without the prompt (`ctrl_ray.exact.prompts` says what that converges to, and what the policy makes of it).

    Half of the labelled data have the prompt 'strict', half 'mild' (`PROMPT_RULES`). A prompt is a case of its own, because
    a policy of closed form has no weights that two prompts share. What is right, and by how much it is off without the prompt
    (10 steps; first the target, then the best policy of fixed variance, which is what training reaches):

                               mean             std              P(x > 0)         P(y|c)
        strict, target         1.685  −0.982    1.089  +0.716    0.920  −0.243    0.459  −0.126
        strict, best policy    1.482  −1.006    1.354  +0.524    0.856  −0.246    0.435  −0.129
        mild,   target         1.125  +0.402    1.591  −0.342    0.785  +0.103    0.886  +0.045
        mild,   best policy    1.045  +0.358    1.648  −0.254    0.761  +0.088    0.876  +0.040

    P(y|c), the accuracy, is judged by the prompt's own rule. That of 'mild' rises above the right one: too many samples are
    those whose label is certain.
    """
    rule = PROMPT_RULES[prompt]
    right = Problem(
        name=f"T8 {prompt}, with c",
        mixture=rule.mixture,
        rewards=(rule.reward,),
        sampler=Sampler(num_steps=10),
        dimension=REPEATS,
        repeated=True,
    )
    marginal = MarginalReward(tuple(PROMPT_RULES.values()))
    wrong = dataclasses.replace(right, name=f"T8 {prompt}, without c", rewards=(marginal,))
    return _case(
        right if with_prompt else wrong,
        "full",
        MIXTURE_BARS,
        coordinates=tuple(range(REPEATS)),
        effort=REPEATED_EFFORT,
        truth=None if with_prompt else right,
        **changes,
    )


def prompt_dependent_cases() -> list[Case]:
    """T8 of every prompt, with the prompt-conditional classifier and without the prompt."""
    return [
        prompt_dependent(prompt, with_prompt=with_prompt) for prompt in PROMPT_RULES for with_prompt in (True, False)
    ]


def last_steps(steps: int = 10) -> Case:
    """T1 with last_k: it lands on the optimum of its last steps, far from that of all."""
    case = gaussian("last_k", estimator_steps=steps)
    return dataclasses.replace(case, controlled_from=case.problem.sampler.num_steps - steps)


def default_cases() -> list[Case]:
    """T1, T4 and T5 at 50 steps."""
    return [gaussian(), logistic(effort=MIXTURE_EFFORT), two_controls()]


def all_cases() -> list[Case]:
    """Every estimator on T1, and every problem."""
    return [
        *(gaussian(name) for name in ("full", "sticking_the_landing", "random_suffix", "adjoint_matching")),
        last_steps(),
        dataclasses.replace(gaussian("reinforce", effort=REINFORCE_EFFORT), bars=REINFORCE_BARS),
        component(effort=MIXTURE_EFFORT),
        *(logistic(strength, effort=MIXTURE_EFFORT) for strength in (1.0, 4.0)),
        logistic(1.0, 200, effort=MIXTURE_EFFORT),
        *(three_modes(slope, steps, effort=MIXTURE_EFFORT) for slope, steps in ((1.0, 50), (2.5, 50), (2.5, 100))),
        two_controls(),
        *(dimension(size, effort=Effort(batch_size=512)) for size in (1, 16, 256)),
        *prompt_dependent_cases(),
    ]


MIXTURE_EFFORT = Effort(num_updates=300, batch_size=8192)
"""Which mode to go to is decided in the first steps, by a small push under much noise."""

REPEATS = 8
"""Trainings whose scatter is the standard error of what a case reaches; fewer make it too uncertain itself."""

REPEATED_EFFORT = Effort(batch_size=2048, num_updates=300, learning_rate=0.15)
"""Of each repeat; ten steps need larger pushes than fifty."""

REINFORCE_EFFORT = Effort(num_updates=400, batch_size=4096, learning_rate=0.03, num_nodes=13)

_PROBLEMS: dict[str, Callable[[], list[Case]]] = {
    "gaussian": lambda: [gaussian()],
    "mixture": lambda: [three_modes(1.0, 50, effort=MIXTURE_EFFORT)],
    "component": lambda: [component(effort=MIXTURE_EFFORT)],
    "logistic": lambda: [logistic(effort=MIXTURE_EFFORT)],
    "two-controls": lambda: [two_controls()],
    "dimension": lambda: [dimension(256, effort=Effort(batch_size=512))],
    "prompt-dependent": prompt_dependent_cases,
}

PROBLEMS: tuple[str, ...] = tuple(_PROBLEMS)
"""Names that `--problem` takes."""


def named_cases(name: str) -> list[Case]:
    """The cases behind a name of `PROBLEMS`: one, except where one is compared with another."""
    return _PROBLEMS[name]()


def _case(problem: Problem, estimator: str, bars: tuple[Bar, ...], **changes: object) -> Case:
    return dataclasses.replace(Case(problem=problem, estimator=estimator, bars=bars), **changes)  # type: ignore[arg-type]
