"""What was reached beside what is exact: the table, its bars, the densities, and the split of the remaining distance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ctrl_ray.canvas import AFTER, BEFORE, INK, new_figure
from ctrl_ray.exact.grid import Answer, Solution, policy_answer, solve_on_grid, total_variation
from ctrl_ray.exact.suite import Bar, Case
from ctrl_ray.exact.witness import check_against_riccati

QUANTITIES = ("mean", "std", "p_positive", "kl", "objective", "tv_to_optimum")


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    problem: str
    estimator: str
    quantity: str
    exact: float
    reached: float
    noise: float
    """What the optimisation has not averaged out: the standard deviation over the last snapshots of the training, or the
    standard error of the mean over its repeats."""
    tolerance: float | None
    """Largest error allowed; None: shown only."""

    @property
    def error(self) -> float:
        """reached − exact; of the objective: relative to |exact|."""
        difference = self.reached - self.exact
        return difference / abs(self.exact) if self.quantity.startswith("objective") and self.exact else difference

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.tolerance is None or abs(self.error) <= self.tolerance


@dataclass(frozen=True)
class CaseResult:
    """A case with its exact answers and the policy's, for one coordinate."""

    case: Case
    coordinate: int
    solution: Solution
    reached: Answer
    """The mean of the repeats', where there are any."""
    rows: tuple[Row, ...]
    repeats: tuple[Answer, ...] = ()
    """Of each repeat of the training."""

    @property
    def passed(self) -> bool:
        """Whether every bar is met."""
        return all(row.passed for row in self.rows)


def verify_case(
    case: Case, means: Mapping[int, np.ndarray], earlier: Sequence[Mapping[int, np.ndarray]]
) -> list[CaseResult]:
    """Solve the case exactly, propagate the policy's kernels on the same grid, and compare, coordinate by coordinate.

    The repeats of a case are one result. ConfigError where the grid is too coarse for the problem
    (`check_against_riccati`).
    """
    verified = []
    for coordinate in case.compared:
        solution = solve_on_grid(case.problem, coordinate, controlled_from=case.controlled_from)
        check_against_riccati(case.problem, coordinate, solution, controlled_from=case.controlled_from)
        if case.problem.repeated:
            laws = [means[each] for each in case.coordinates]
        else:
            laws = [look[coordinate] for look in (*earlier, means)]
        looks = [policy_answer(case.problem, solution.grid, list(law), coordinate) for law in laws]
        repeats = tuple(looks) if case.problem.repeated else ()
        reached = _average(repeats) if repeats else looks[-1]
        rows = tuple(_row(case, coordinate, solution, reached, looks, name) for name in QUANTITIES)
        verified.append(CaseResult(case, coordinate, solution, reached, rows, repeats))
    return verified


def _average(answers: Sequence[Answer]) -> Answer:
    return Answer(
        **{each.name: np.mean([getattr(a, each.name) for a in answers], axis=0) for each in dataclasses.fields(Answer)}
    )


def _row(case: Case, coordinate: int, solution: Solution, reached: Answer, looks: Sequence[Answer], name: str) -> Row:
    """looks: the last snapshots of the training, or its repeats."""
    exact = 0.0 if name == "tv_to_optimum" else getattr(solution.optimum, name)
    values = [_value(answer, solution, name) for answer in looks]
    bars: dict[str, Bar] = {bar.quantity: bar for bar in case.bars}
    where = f" [{coordinate}]" if len(case.compared) > 1 else ""
    noise = float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
    return Row(
        problem=case.problem.name + where,
        estimator=case.estimator + (f" {case.estimator_steps}" if case.estimator_steps else ""),
        quantity=name,
        exact=exact,
        reached=_value(reached, solution, name),
        noise=noise / len(values) ** 0.5 if case.problem.repeated else noise,
        tolerance=bars[name].tolerance if name in bars else None,
    )


def _value(answer: Answer, solution: Solution, name: str) -> float:
    if name == "tv_to_optimum":
        return total_variation(answer.law, solution.optimum.law)
    return float(getattr(answer, name))


def machine_summary(verified: CaseResult) -> dict[str, float]:
    """The numbers of `--json`, of this coordinate."""
    reached, solution = verified.reached, verified.solution
    return {
        "mean": reached.mean,
        "std": reached.std,
        "p_positive": reached.p_positive,
        "kl": reached.kl,
        "objective": reached.objective,
        "objective_optimum": solution.optimum.objective,
        "objective_free": solution.free.objective,
        "log_z": solution.log_z,
        "tv_to_optimum": total_variation(reached.law, solution.optimum.law),
        "tv_to_target": total_variation(reached.law, solution.tilt.law),
    }


def format_table(verified: Sequence[CaseResult]) -> str:
    """problem · estimator · quantity · exact · reached · error · noise · bar, one line for each quantity; then T7."""
    lines = [
        f"{'problem':<34} {'estimator':<20} {'quantity':<14} {'exact':>9} {'reached':>9} {'error':>9} {'noise':>8}  bar"
    ]
    for item in verified:
        for row in item.rows:
            error = f"{100 * row.error:8.3f}%" if row.quantity == "objective" else f"{row.error:9.4f}"
            lines.append(
                f"{row.problem:<34} {row.estimator:<20} {row.quantity:<14} {row.exact:9.4f} {row.reached:9.4f} {error} "
                f"{row.noise:8.4f}  {_bar(row)}"
            )
        solution = item.solution
        lines.append(
            f"{'':<34} {'':<20} bounds: reached {item.reached.objective:.4f} ≤ fixed variance "
            f"{solution.optimum.objective:.4f} ≤ free {solution.free.objective:.4f} ≤ log Z {solution.log_z:.4f}; total "
            f"variation to the target {total_variation(item.reached.law, solution.tilt.law):.4f}"
        )
    return "\n".join(lines)


def _bar(row: Row) -> str:
    if row.tolerance is None:
        return ""
    limit = f"{100 * row.tolerance:g}%" if row.quantity == "objective" else f"{row.tolerance:g}"
    return f"{'ok' if row.passed else 'MISSED'} (≤ {limit})"


def plot_densities(path: Path, verified: Sequence[CaseResult]) -> Path:
    """Densities of the base, the target, the best fixed-variance policy and the one reached, a panel for each case."""
    columns = min(3, len(verified))
    lines = -(-len(verified) // columns)
    with new_figure(path, 3.6 * columns, 2.5 * lines + 0.6) as figure:
        axes = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
        for axis, item in zip(axes, verified, strict=False):
            _draw_densities(axis, item)
        for axis in axes[len(verified) :]:
            axis.set_visible(False)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4 if columns > 2 else 1 if columns == 1 else 2)
    return path


def _draw_densities(axis: Any, item: CaseResult) -> None:
    grid, solution = item.solution.grid, item.solution
    curves = {
        "pre-trained sampler": (solution.base.law, {"color": BEFORE, "linewidth": 1.0}),
        "target p · p(y|x)^γ": (solution.tilt.law, {"color": "#c7791a", "linewidth": 2.6, "alpha": 0.55}),
        "best fixed-variance policy": (solution.optimum.law, {"color": INK, "linewidth": 1.0, "linestyle": "--"}),
        "reached": (item.reached.law, {"color": AFTER, "linewidth": 1.2}),
    }
    for label, (law, style) in curves.items():
        axis.plot(grid.centres, law / grid.width, label=label, **style)
    shown = np.flatnonzero(np.maximum(solution.base.law, solution.tilt.law) / grid.width > 2e-3)
    axis.set_xlim(grid.centres[shown[0]], grid.centres[shown[-1]])
    axis.set_ylim(bottom=0)
    where = f", coordinate {item.coordinate}" if len(item.case.compared) > 1 else ""
    axis.set_title(f"{item.case.problem.name}{where}\n{item.case.estimator}", fontsize=8.5)
    axis.set_xlabel("x₀")
    axis.set_ylabel("density")
