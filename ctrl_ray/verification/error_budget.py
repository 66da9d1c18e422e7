"""What keeps a fine-tuned sampler from the true conditional, split into its causes, on a problem that is solved exactly.

    true conditional → tilt by the fitted classifier → best policy with the initial noise as it is
                     → best policy with fixed variances → the policy that training reached

Each arrow is one cause: the classifier, the initial noise, the fixed variances, the optimisation.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, log_expit

from ctrl_ray.canvas import AFTER, BEFORE, INK, new_figure
from ctrl_ray.exact.grid import Answer, Grid, Solution, solve_on_grid, total_variation
from ctrl_ray.exact.problems import LogisticReward, Problem
from ctrl_ray.exact.suite import Case

CAUSES = ("classifier", "initial noise", "fixed variances", "optimisation")


@dataclass(frozen=True)
class ErrorBudget:
    """Distances in total variation to the true conditional p(x_0) p(y|x_0)^(γ/β)."""

    grid: Grid
    truth: Answer
    stages: tuple[Answer, ...]
    """After the classifier, the initial noise, the fixed variances, the optimisation: each with those before it."""
    exact_classifier: Answer
    """What training reaches with the true p(y|x): the classifier's error switched off, all others on."""

    @property
    def links(self) -> dict[str, float]:
        """Distance that each cause adds, between neighbouring stages; together at least the whole."""
        laws = [self.truth.law, *(stage.law for stage in self.stages)]
        return {cause: total_variation(one, other) for cause, one, other in zip(CAUSES, laws, laws[1:], strict=False)}

    @property
    def switched_off(self) -> dict[str, float]:
        """Distance to the truth with all causes on, and with some of them switched off."""
        distances = [total_variation(self.truth.law, stage.law) for stage in self.stages]
        return {
            "all on": distances[3],
            "exact classifier": total_variation(self.truth.law, self.exact_classifier.law),
            "exact optimisation": distances[2],
            "exact optimisation, free variances": distances[1],
            "exact optimisation, free variances, free initial noise": distances[0],
        }


def fit_logistic(problem: Problem, num_labels: int, seed: int) -> LogisticReward:
    """Maximum-likelihood logistic regression on labelled samples of the pre-trained sampler, as stage 1 fits p(y|x)."""
    true = problem.rewards[0]
    assert isinstance(true, LogisticReward)
    solution = solve_on_grid(problem)
    rng = np.random.default_rng(seed)
    x = rng.choice(solution.grid.centres, num_labels, p=solution.base.law / solution.base.law.sum())
    sign = np.where(rng.uniform(size=num_labels) < expit(true.slope * x + true.offset), 1.0, -1.0)
    fitted = minimize(lambda w: -log_expit(sign * (w[0] * x + w[1])).mean() + 1e-6 * (w @ w), np.zeros(2))
    return LogisticReward(float(fitted.x[0]), float(fitted.x[1]))


def budget_cases(case: Case, num_labels: int, seed: int) -> tuple[Case, Case]:
    """(the case with a fitted classifier, the same with the true one), to be trained."""
    fitted = fit_logistic(case.problem, num_labels, seed)
    name = f"{case.problem.name}, classifier of {num_labels} labels"
    problem = dataclasses.replace(case.problem, name=name, rewards=(fitted,))
    return dataclasses.replace(case, problem=problem), case


def error_budget(true_problem: Problem, fitted: Solution, reached: Answer, exact_classifier: Answer) -> ErrorBudget:
    """From the fitted problem's exact answers and what the two trainings reached, all on one grid."""
    truth = solve_on_grid(true_problem)
    return ErrorBudget(
        grid=fitted.grid,
        truth=truth.tilt,
        stages=(fitted.tilt, fitted.free, fitted.optimum, reached),
        exact_classifier=exact_classifier,
    )


def format_budget(budget: ErrorBudget) -> str:
    """Two tables: what each cause adds, and what is left with causes switched off."""
    names = ("true conditional", *(f"+ {cause}" for cause in CAUSES))
    answers = (budget.truth, *budget.stages)
    lines = [f"{'':<20} {'mean':>8} {'std':>8} {'P(x>0)':>8} {'adds (TV)':>10}"]
    for name, answer, added in zip(names, answers, (None, *budget.links.values()), strict=True):
        tail = "" if added is None else f"{added:10.4f}"
        lines.append(f"{name:<20} {answer.mean:8.4f} {answer.std:8.4f} {answer.p_positive:8.4f} {tail}")
    lines += ["", "total variation to the true conditional"]
    return "\n".join([*lines, *(f"  {name:<56} {value:.4f}" for name, value in budget.switched_off.items())])


def plot_budget(path: Path, budget: ErrorBudget) -> Path:
    """Left: what each cause adds. Right: the densities at both ends."""
    with new_figure(path, 8.0, 2.9) as figure:
        left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
        causes, values = list(budget.links), list(budget.links.values())
        bars = left.barh(causes[::-1], values[::-1], color=AFTER, height=0.6)
        left.bar_label(bars, fmt="%.4f", padding=3, fontsize=8)
        left.axvline(budget.switched_off["all on"], color=INK, linestyle="--", linewidth=1, label="whole distance")
        left.set_xlim(0, 1.2 * max(*values, budget.switched_off["all on"]))
        left.set_xlabel("total variation")
        left.set_title("What each cause adds")
        left.legend(loc="lower right")
        for law, label, colour, width in (
            (budget.truth.law, "true conditional", "#c7791a", 2.4),
            (budget.stages[0].law, "target of the fitted classifier", BEFORE, 1.2),
            (budget.stages[-1].law, "reached", AFTER, 1.2),
        ):
            right.plot(budget.grid.centres, law / budget.grid.width, label=label, color=colour, linewidth=width)
        shown = np.flatnonzero(budget.truth.law / budget.grid.width > 2e-3)
        right.set_xlim(budget.grid.centres[shown[0]], budget.grid.centres[shown[-1]])
        right.set_ylim(bottom=0)
        right.set_xlabel("x₀")
        right.set_ylabel("density")
        right.legend(loc="upper left")
    return path
