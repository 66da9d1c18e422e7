"""Flags of `python -m ctrl_ray.verify`, and that wrong gradients are caught by it."""

from __future__ import annotations

from typing import Any

import pytest

from ctrl_ray import verify
from ctrl_ray.errors import ConfigError
from ctrl_ray.exact.problems import GaussianReward, LogisticReward
from ctrl_ray.exact.suite import all_cases, default_cases
from ctrl_ray.verify import VerifyOptions


def test_flags_change_the_named_problem() -> None:
    """Mixture, reward, sampler, strength and estimator; what is not given stays."""
    options = VerifyOptions(
        problem="logistic",
        means=(-1.0, 0.5, 3.0),
        stds=(0.2, 0.3, 0.4),
        weights=(1.0, 2.0, 3.0),
        reward_slope=2.5,
        guidance_strength=(4.0,),
        kl_coef=2.0,
        num_steps=20,
        eta=0.7,
        estimator="last_k",
        estimator_steps=5,
        seed=3,
    )
    (case,) = options.cases()
    problem = case.problem
    assert problem.mixture.means == (-1.0, 0.5, 3.0) and problem.mixture.weights == (1.0, 2.0, 3.0)
    assert problem.rewards == (LogisticReward(2.5),) and problem.guidance_strengths == (4.0,)
    assert (problem.kl_coef, problem.sampler.num_steps, problem.sampler.eta) == (2.0, 20, 0.7)
    assert (case.estimator, case.estimator_steps, case.controlled_from, case.seed) == ("last_k", 5, 15, 3)
    (two,) = VerifyOptions(problem="two-controls", reward_target=1.0).cases()
    assert two.problem.rewards[0] == GaussianReward(1.0, 0.5) and isinstance(two.problem.rewards[1], LogisticReward)


def test_default_and_all_are_the_suites() -> None:
    """With the seed of the flags."""
    assert [case.title for case in VerifyOptions().cases()] == [case.title for case in default_cases()]
    cases = VerifyOptions(all=True, seed=5).cases()
    assert [case.title for case in cases] == [case.title for case in all_cases()] and {c.seed for c in cases} == {5}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"means": (0.0,)}, "--means.*--problem"),
        ({"all": True, "problem": "gaussian"}, "--all runs every problem"),
        ({"adapter": "x"}, "--pipeline"),
        ({"pipeline": "shapes", "all": True}, "comparison of its own"),
        ({"error_budget": True, "all": True}, "one problem"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], message: str) -> None:
    """Before anything starts."""
    with pytest.raises(ConfigError, match=message):
        VerifyOptions(**flags)


def test_a_mistake_in_the_flags_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line."""
    arguments = ["--problem", "logistic", "--means", "0", "1", "--stds", "1", "--weights", "1", "1"]
    assert verify.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: a mixture needs as many means (2) as stds (1)") and len(error.splitlines()) == 1
