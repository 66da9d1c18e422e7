"""Predicted beside measured: what a policy is off by whose classifier did not see the prompt."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from ctrl_ray.exact.grid import Solution, solve_on_grid
from ctrl_ray.exact.problems import Problem, Sampler
from ctrl_ray.exact.suite import Case, PromptName, prompt_dependent
from ctrl_ray.verification.bias import find_pairs, format_biases, machine_biases, measure_biases, plot_biases
from ctrl_ray.verification.table import CaseResult, verify_case
from tests.pictures import line

SCATTER = (-0.03, 0.005, 0.01, 0.015)
"""What the repeats' means are off by, with the prompt; without it twice as much."""


@functools.cache
def _solved(problem: Problem) -> Solution:
    return solve_on_grid(problem, num_bins=400)


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here depends on the last digits."""
    monkeypatch.setattr("ctrl_ray.verification.table.solve_on_grid", lambda problem, *_, **__: _solved(problem))
    yield


def short(prompt: PromptName, with_prompt: bool) -> Case:
    """The case at 4 steps with 4 repeats."""
    case = prompt_dependent(prompt, with_prompt=with_prompt)

    def shortened(problem: Problem) -> Problem:
        return dataclasses.replace(problem, sampler=Sampler(num_steps=4), dimension=len(SCATTER))

    return dataclasses.replace(
        case,
        problem=shortened(case.problem),
        truth=None if case.truth is None else shortened(case.truth),
        coordinates=tuple(range(len(SCATTER))),
    )


def reached(case: Case, shifts: Sequence[float]) -> CaseResult:
    """Repeat i reaches the best policy, but that its last step's mean is off by shifts[i]."""
    means = {}
    for index, shift in enumerate(shifts):
        means[index] = np.array(_solved(case.problem).policy_means)
        means[index][-1] += shift
    (result,) = verify_case(case, means, [])
    return result


def test_the_bias_is_that_of_the_repeats_and_its_standard_error_theirs() -> None:
    """By hand: the differences of the means are the predicted bias plus the scatter, pair by pair."""
    right = reached(short("strict", True), SCATTER)
    wrong = reached(short("strict", False), [2 * shift for shift in SCATTER])
    ((pair),) = find_pairs([right, wrong])
    assert pair == (wrong, right)
    mean, positive, label = measure_biases([pair])
    predicted = _solved(wrong.case.problem).optimum.mean - _solved(right.case.problem).optimum.mean
    error = np.std(SCATTER, ddof=1) / 2
    assert (mean.predicted, mean.measured) == pytest.approx((predicted, predicted), abs=5e-4)  # the scatter's mean is 0
    assert mean.standard_error == pytest.approx(error, rel=2e-2) and mean.predicted < -0.5
    assert mean.passed and abs(mean.distance) < 0.1
    assert (positive.quantity, label.quantity) == ("p_positive", "p_label")
    accuracy = np.exp(right.case.problem.rewards[0].log_prob(right.solution.grid.centres))
    assert label.right == pytest.approx(right.solution.optimum.law @ accuracy)
    assert label.of_target == pytest.approx((wrong.solution.tilt.law - right.solution.tilt.law) @ accuracy)
    assert label.of_target < -0.05
    assert machine_biases([mean])["mean"] == {
        "predicted": mean.predicted,
        "measured": mean.measured,
        "standard_error": mean.standard_error,
        "of_target": mean.of_target,
    }


def test_repeats_are_one_result_with_their_standard_error_as_its_noise() -> None:
    result = reached(short("mild", True), SCATTER)
    (row,) = [row for row in result.rows if row.quantity == "mean"]
    assert row.problem == "T8 mild, with c" and len(result.repeats) == len(SCATTER)
    assert row.noise == pytest.approx(np.std(SCATTER, ddof=1) / 2, rel=2e-2)
    assert row.reached == pytest.approx(np.mean([answer.mean for answer in result.repeats]))
    np.testing.assert_allclose(result.reached.law, np.mean([answer.law for answer in result.repeats], axis=0))


def test_a_bias_that_theory_does_not_predict_or_that_the_scatter_hides_is_missed() -> None:
    """Four standard errors too far; and a scatter of a tenth of the bias, on which no claim can rest."""
    right = reached(short("mild", True), (0.0,) * 4)
    (predicted, *_) = measure_biases([(reached(short("mild", False), (0.0,) * 4), right)])
    assert 0.2 < predicted.predicted < 0.6
    for shift, scatter, passed in ((0.0, 1.0, True), (4.0, 1.0, False), (0.0, 6.0, False)):
        shifts = [scatter * each + shift * np.std(SCATTER, ddof=1) / 2 for each in SCATTER]
        (mean, *_) = measure_biases([(reached(short("mild", False), shifts), right)])
        assert mean.passed is passed, (shift, scatter)
        assert ("ok" in format_biases([mean])) is passed and ("MISSED" in format_biases([mean])) is not passed
        if scatter == 1.0:
            assert mean.distance == pytest.approx(shift, abs=0.1)


def test_only_a_case_with_its_truth_beside_it_has_a_bias() -> None:
    right, wrong = (reached(short("mild", with_prompt), SCATTER) for with_prompt in (True, False))
    other = reached(short("strict", True), SCATTER)
    assert find_pairs([right, other]) == [] == find_pairs([wrong, other])
    assert find_pairs([wrong, other, right]) == [(wrong, right)]


def test_the_picture_shows_laws_and_biases(tmp_path: Path, figures: dict[str, Figure]) -> None:
    pairs = [
        (reached(short(prompt, False), SCATTER), reached(short(prompt, True), SCATTER))
        for prompt in ("strict", "mild")  # type: ignore[arg-type]
    ]
    assert plot_biases(tmp_path / "bias.png", pairs).is_file()  # type: ignore[arg-type]
    strict, _, last = figures["bias.png"].axes
    assert strict.get_title(loc="left") == "T8 strict"
    grid = pairs[0][0].solution.grid
    for label, law in (
        ("best policy for p(y|x,c)", pairs[0][1].solution.optimum.law),
        ("best policy for p̄(y|x)", pairs[0][0].solution.optimum.law),
        ("reached with c", pairs[0][1].reached.law),
        ("reached without c", pairs[0][0].reached.law),
    ):
        np.testing.assert_allclose(line(strict, label)[:, 1], law / grid.width, atol=1e-12)
    shown = [bias for bias in measure_biases(pairs) if bias.quantity != "mean"]
    assert [bar.get_width() for bar in last.patches] == [bias.predicted for bias in shown]
    assert len(shown) == 4 and [bias.predicted < 0 for bias in shown] == [True, True, False, False]
    assert [label.get_text().splitlines()[1] for label in last.get_yticklabels()] == ["P(x > 0)", "P(y|c)"] * 2
