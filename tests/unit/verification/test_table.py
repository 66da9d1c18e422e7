"""The table of exact against reached, and the split of the remaining error."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from ctrl_ray.errors import ConfigError
from ctrl_ray.exact.chain import reference_chain
from ctrl_ray.exact.grid import Solution, make_grid, solve_on_grid
from ctrl_ray.exact.problems import Problem, Sampler
from ctrl_ray.exact.suite import Case, all_cases, default_cases, gaussian, logistic
from ctrl_ray.verification import table
from ctrl_ray.verification.error_budget import (
    CAUSES,
    ErrorBudget,
    budget_cases,
    error_budget,
    fit_logistic,
    format_budget,
    plot_budget,
)
from ctrl_ray.verification.table import format_table, machine_summary, plot_densities, verify_case
from tests.pictures import line

NUM_BINS = 600
"""Half of the command's: nothing here depends on the last digits."""


@functools.cache
def _solved(problem: Problem, coordinate: int, controlled_from: int) -> Solution:
    return solve_on_grid(problem, coordinate, NUM_BINS, controlled_from=controlled_from)


def solve(problem: Problem, coordinate: int = 0, *, controlled_from: int = 0) -> Solution:
    """`solve_on_grid`, once for each problem of this file."""
    return _solved(problem, coordinate, controlled_from)


@pytest.fixture(scope="module", autouse=True)
def solve_once() -> Iterator[None]:
    """What is tested here solves the same problem again and again."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("table", "error_budget"):
            patch.setattr(f"ctrl_ray.verification.{module}.solve_on_grid", solve)
        yield


@pytest.fixture(scope="module")
def case() -> Case:
    """T4 at 10 steps."""
    return logistic(num_steps=10)


@pytest.mark.full
def test_the_optimum_meets_every_bar_and_the_reference_does_not(
    case: Case, tmp_path: Path, figures: dict[str, Figure]
) -> None:
    """Means of the best policy pass with error 0; the pre-trained sampler's miss, and the table says so."""
    solution = solve(case.problem)
    best = np.array(solution.policy_means)
    chain = reference_chain(case.problem.mixture, case.problem.sampler)
    reference = np.array([step.mean(make_grid(case.problem, NUM_BINS).centres) for step in chain])
    (good,) = verify_case(case, {0: best}, [{0: best}])
    (bad,) = verify_case(case, {0: reference}, [{0: best}])
    assert good.passed and all(abs(row.error) < 1e-9 and row.noise < 1e-9 for row in good.rows)
    assert not bad.passed
    missed = {row.quantity for row in bad.rows if not row.passed}
    assert missed == {"mean", "std", "p_positive", "objective", "tv_to_optimum"}
    printed = format_table([good, bad])
    assert printed.count("MISSED") == 5 and "log Z" in printed
    assert machine_summary(good)["tv_to_optimum"] == 0 < machine_summary(good)["tv_to_target"]
    assert plot_densities(tmp_path / "d.png", [good, bad]).is_file()
    left, right = figures["d.png"].axes
    for axis, reached in ((left, solution.optimum), (right, solution.base)):
        for label, law in (
            ("pre-trained sampler", solution.base.law),
            ("target p · p(y|x)^γ", solution.tilt.law),
            ("best fixed-variance policy", solution.optimum.law),
            ("reached", reached.law),
        ):
            density = np.stack([solution.grid.centres, law / solution.grid.width], axis=1)
            np.testing.assert_allclose(line(axis, label), density, atol=1e-9)


def test_an_answer_that_the_riccati_recursion_contradicts_is_not_compared_with(monkeypatch: pytest.MonkeyPatch) -> None:
    t1 = gaussian()
    short = dataclasses.replace(t1, problem=dataclasses.replace(t1.problem, sampler=Sampler(num_steps=2)))
    chain = reference_chain(short.problem.mixture, short.problem.sampler)
    means = {0: np.array([step.mean(make_grid(short.problem, NUM_BINS).centres) for step in chain])}
    assert len(verify_case(short, means, [])) == 1
    monkeypatch.setattr(table, "solve_on_grid", functools.partial(solve_on_grid, num_bins=60))
    with pytest.raises(ConfigError, match="T1 gaussian, coordinate 0: the two exact solvers disagree"):
        verify_case(short, means, [])


def test_sets_of_cases_have_unique_titles_and_bars() -> None:
    """Rewards are looked up by title, so no two may share one."""
    for cases in (default_cases(), all_cases()):
        titles = [case.title for case in cases]
        assert len(set(titles)) == len(titles)
        assert all(case.bars for case in cases)


@pytest.mark.full
def test_fitted_classifier_comes_closer_with_more_labels(case: Case) -> None:
    """Maximum likelihood on samples of the pre-trained sampler."""
    few, many = (fit_logistic(case.problem, count, seed=0) for count in (100, 100_000))
    assert (many.slope, many.offset) == pytest.approx((1.0, 0.0), abs=0.05)
    assert abs(few.slope - 1) + abs(few.offset) > abs(many.slope - 1) + abs(many.offset)


@pytest.mark.full
def test_causes_can_be_switched_off(case: Case, tmp_path: Path, figures: dict[str, Figure]) -> None:
    """With the exact optimum in place of a training, its link is 0; with the true classifier, the first link is."""
    fitted_case, true_case = budget_cases(case, 200, seed=1)
    fitted, true = solve(fitted_case.problem), solve(true_case.problem)
    budget = error_budget(true_case.problem, fitted, fitted.optimum, true.optimum)
    assert tuple(budget.links) == CAUSES
    assert budget.links["optimisation"] == 0 < budget.links["classifier"]
    whole = budget.switched_off
    assert whole["all on"] <= sum(budget.links.values()) + 1e-12
    assert whole["exact optimisation"] == whole["all on"]
    exact = error_budget(true_case.problem, true, true.optimum, true.optimum)
    assert (
        exact.links["classifier"] == 0
        and exact.switched_off["exact optimisation, free variances, free initial noise"] == 0
    )
    more = dataclasses.replace(case.problem, sampler=Sampler(num_steps=25))
    solution = solve(more)
    finer = ErrorBudget(
        solution.grid,
        solution.tilt,
        (solution.tilt, solution.free, solution.optimum, solution.optimum),
        solution.optimum,
    )
    assert finer.links["fixed variances"] < exact.links["fixed variances"]
    assert "classifier" in format_budget(budget)
    assert plot_budget(tmp_path / "b.png", budget).is_file()
    added, ends = figures["b.png"].axes
    assert [bar.get_width() for bar in added.patches] == [budget.links[cause] for cause in reversed(CAUSES)]
    assert [label.get_text() for label in added.get_yticklabels()] == list(reversed(CAUSES))
    assert line(added, "whole distance")[0, 0] == whole["all on"]
    np.testing.assert_allclose(line(ends, "true conditional")[:, 1], true.tilt.law / true.grid.width)
    np.testing.assert_allclose(line(ends, "reached")[:, 1], fitted.optimum.law / fitted.grid.width)
