"""By how much a policy misses its target because its classifier was fitted without the prompt: predicted, and measured.

Predicted is the difference of two exact answers, with log p̄(y|x) and with log p(y|x,c) as the reward (`ctrl_ray.exact.prompts`
derives them). Measured is the difference of what two trainings reached. Repeat i of one training and repeat i of the other have
the same noise; the standard error is that of the mean of their differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctrl_ray.canvas import AFTER, BEFORE, INK, new_figure
from ctrl_ray.exact.grid import Answer
from ctrl_ray.verification.table import CaseResult

MOST_STANDARD_ERRORS = 3.0
"""How far the measured bias may be from the predicted one."""

FEWEST_STANDARD_ERRORS = 10.0
"""How large the predicted bias must be: a scatter in which no bias could be seen confirms none."""

_NAMES = {"mean": "mean", "p_positive": "P(x > 0)", "p_label": "P(y|c)"}


@dataclass(frozen=True)
class Bias:
    """Of one quantity of one case, all in the quantity's unit."""

    problem: str
    quantity: str
    """'mean', 'p_positive', or 'p_label': P(y|c), the accuracy by the rule of the prompt."""
    right: float
    """The quantity under the best policy for the right reward."""
    of_target: float
    """Bias of the target; what a sampler of very many steps would show."""
    predicted: float
    """Bias of the best policy of fixed variance."""
    measured: float
    standard_error: float
    """Of the measured bias."""

    @property
    def distance(self) -> float:
        """measured − predicted, in standard errors."""
        return (self.measured - self.predicted) / self.standard_error if self.standard_error else 0.0

    @property
    def passed(self) -> bool:
        """Whether the measured bias is the predicted one, and can be told from none."""
        is_predicted = abs(self.measured - self.predicted) <= MOST_STANDARD_ERRORS * self.standard_error
        return is_predicted and FEWEST_STANDARD_ERRORS * self.standard_error <= abs(self.predicted)


def find_pairs(verified: Sequence[CaseResult]) -> list[tuple[CaseResult, CaseResult]]:
    """(with the wrong reward, with the right one) of every case that has a `truth` among the others."""
    return [
        (wrong, right)
        for wrong in verified
        for right in verified
        if wrong.case.truth is not None and right.case.problem == wrong.case.truth
    ]


def measure_biases(pairs: Sequence[tuple[CaseResult, CaseResult]]) -> list[Bias]:
    """The biases of every pair of `find_pairs`, quantity by quantity."""
    return [_bias(wrong, right, quantity) for wrong, right in pairs for quantity in _NAMES]


def _bias(wrong: CaseResult, right: CaseResult, quantity: str) -> Bias:
    def value(answer: Answer) -> float:
        if quantity != "p_label":
            return float(getattr(answer, quantity))
        rule = right.case.problem.rewards[right.coordinate]
        return float(answer.law @ np.exp(rule.log_prob(right.solution.grid.centres)))

    differences = [value(one) - value(other) for one, other in zip(wrong.repeats, right.repeats, strict=True)]
    return Bias(
        problem=wrong.case.problem.name,
        quantity=quantity,
        right=value(right.solution.optimum),
        of_target=value(wrong.solution.tilt) - value(right.solution.tilt),
        predicted=value(wrong.solution.optimum) - value(right.solution.optimum),
        measured=float(np.mean(differences)),
        standard_error=float(np.std(differences, ddof=1) / len(differences) ** 0.5),
    )


def machine_biases(biases: Sequence[Bias]) -> dict[str, dict[str, float]]:
    """The numbers of `--json`, by quantity."""
    return {
        bias.quantity: {name: getattr(bias, name) for name in ("predicted", "measured", "standard_error", "of_target")}
        for bias in biases
    }


def format_biases(biases: Sequence[Bias]) -> str:
    """A line for each quantity of each case."""
    lines = [
        f"{'bias of a classifier without c':<34} {'quantity':<10} {'right':>8} {'of target':>10} {'predicted':>10} "
        f"{'measured':>9} {'± SE':>8} {'off by':>8}"
    ]
    for bias in biases:
        lines.append(
            f"{bias.problem:<34} {_NAMES[bias.quantity]:<10} {bias.right:8.4f} {bias.of_target:+10.4f} {bias.predicted:+10.4f} "
            f"{bias.measured:+9.4f} {bias.standard_error:8.4f} {bias.distance:+5.1f} SE  {'ok' if bias.passed else 'MISSED'}"
        )
    return "\n".join(lines)


def plot_biases(path: Path, pairs: Sequence[tuple[CaseResult, CaseResult]]) -> Path:
    """A panel of densities for each pair, and one of the biases of P(x > 0) and P(y|c): predicted, and measured ± 3 SE."""
    with new_figure(path, 3.4 * (len(pairs) + 1), 3.2) as figure:
        *axes, last = figure.subplots(1, len(pairs) + 1)
        for axis, (wrong, right) in zip(axes, pairs, strict=True):
            _draw_densities(axis, wrong, right)
        shown = [bias for bias in measure_biases(pairs) if bias.quantity != "mean"]
        places = np.arange(len(shown))[::-1]
        last.barh(places, [bias.predicted for bias in shown], color=BEFORE, height=0.6, label="predicted")
        reach = [MOST_STANDARD_ERRORS * bias.standard_error for bias in shown]
        measured = [bias.measured for bias in shown]
        last.errorbar(
            measured, places, xerr=reach, fmt="o", markersize=3, color=AFTER, capsize=3, label="measured ± 3 SE"
        )
        last.set_yticks(places, [f"{bias.problem}\n{_NAMES[bias.quantity]}" for bias in shown], fontsize=7.5)
        last.axvline(0, color=INK, linewidth=0.8)
        last.set_title("Bias without c", fontsize=8.5)
        last.legend(loc="best", fontsize=7.5)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return path


def _draw_densities(axis: Any, wrong: CaseResult, right: CaseResult) -> None:
    grid = right.solution.grid
    for law, label, style in (
        (right.solution.optimum.law, "best policy for p(y|x,c)", {"color": "#c7791a", "linewidth": 2.6, "alpha": 0.55}),
        (wrong.solution.optimum.law, "best policy for p̄(y|x)", {"color": BEFORE, "linewidth": 2.6, "alpha": 0.55}),
        (right.reached.law, "reached with c", {"color": INK, "linewidth": 1.0}),
        (wrong.reached.law, "reached without c", {"color": AFTER, "linewidth": 1.2}),
    ):
        axis.plot(grid.centres, law / grid.width, label=label, **style)
    shown = np.flatnonzero(np.maximum(right.reached.law, wrong.reached.law) / grid.width > 2e-3)
    axis.set_xlim(grid.centres[shown[0]], grid.centres[shown[-1]])
    axis.set_ylim(bottom=0)
    axis.set_title(right.case.problem.name.removesuffix(", with c"), fontsize=8.5)
    axis.set_xlabel("x₀")
    axis.set_ylabel("density")
