"""Flags of `python -m ctrl_ray.verify`, and that wrong gradients are caught by it."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctrl_ray import verify
from ctrl_ray.errors import ConfigError
from ctrl_ray.exact.grid import solve_on_grid
from ctrl_ray.exact.problems import GaussianReward, LogisticReward, Sampler
from ctrl_ray.exact.prompts import MarginalReward
from ctrl_ray.exact.suite import Case, all_cases, default_cases
from ctrl_ray.verification.pipeline import Question
from ctrl_ray.verification.table import CaseResult, verify_case
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


def test_flags_change_a_problem_of_several_cases_alike() -> None:
    """The wrong reward averages over the changed prompts, and is compared with the changed right one."""
    options = VerifyOptions(
        problem="prompt-dependent",
        stds=(0.6, 0.4),
        reward_slope=2.0,
        guidance_strength=(3.0,),
        num_steps=5,
        dimension=4,
        batch_size=64,
        seed=2,
    )
    cases = options.cases()
    strict, wrong, mild, _ = cases
    names = ["T8 strict, with c", "T8 strict, without c", "T8 mild, with c", "T8 mild, without c"]
    assert [case.problem.name for case in cases] == names
    assert strict.problem.rewards == (LogisticReward(2.0, -2.0),) and mild.problem.rewards == (
        LogisticReward(2.0, 2.0),
    )
    (marginal,) = wrong.problem.rewards
    assert isinstance(marginal, MarginalReward)
    assert [(rule.mixture, rule.reward) for rule in marginal.rules] == [
        (case.problem.mixture, case.problem.rewards[0]) for case in (strict, mild)
    ]
    assert strict.problem.mixture.stds == (0.6, 0.4) and strict.problem.mixture.weights == (0.65, 0.35)
    assert wrong.truth == strict.problem and strict.truth is None
    for case in cases:
        assert (case.problem.sampler.num_steps, case.problem.guidance_strengths) == (5, (3.0,))
        assert (case.coordinates, case.compared, case.effort.batch_size, case.seed) == ((0, 1, 2, 3), (0,), 64, 2)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_what_a_classifier_without_the_prompt_misses_is_told_and_judged(
    shift: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trainings that reach their optimum pass. Where the one without the prompt ends elsewhere by `shift`, its own bars and its
    biases are missed. The numbers, in results.json too, are those of the pair."""

    solve = functools.cache(functools.partial(solve_on_grid, num_bins=300))

    def reached(case: Case) -> CaseResult:
        best = np.array(solve(case.problem).policy_means)
        best[-1] += shift if case.truth else 0.0
        (result,) = verify_case(case, {each: best + 1e-4 * (each - 1) for each in case.coordinates}, [])
        return result

    monkeypatch.setattr(verify, "_train_and_compare", lambda cases, options: [reached(case) for case in cases])
    monkeypatch.setattr("ctrl_ray.verification.table.solve_on_grid", lambda problem, *_, **__: solve(problem))
    flags: dict[str, Any] = {"problem": "prompt-dependent", "num_steps": 3, "dimension": 3, "output_dir": str(tmp_path)}
    assert verify.verify(VerifyOptions(**flags)) is (shift == 0)
    printed = capsys.readouterr().out
    assert ("every bar is met" in printed) is (shift == 0) and ("MISSED" in printed) is (shift != 0)
    results = json.loads((tmp_path / "results.json").read_text())
    assert "bias" not in results["T8 strict, with c · full"]
    bias = results["T8 strict, without c · full"]["bias"]["mean"]
    assert bias["measured"] - bias["predicted"] == pytest.approx(shift, abs=0.02) and bias["predicted"] < -0.3
    assert (tmp_path / verify.BIASES).is_file() and str(tmp_path / verify.BIASES) in printed


def test_default_and_all_are_the_suites() -> None:
    """With the seed of the flags."""
    assert [case.title for case in VerifyOptions().cases()] == [case.title for case in default_cases()]
    cases = VerifyOptions(all=True, seed=5).cases()
    assert [case.title for case in cases] == [case.title for case in all_cases()] and {c.seed for c in cases} == {5}


def test_every_problem_can_be_one_of_flow_matching() -> None:
    """Under a name that says so, as it is but for the sampler; and the SDE of one."""
    plain, flow = VerifyOptions(all=True).cases(), VerifyOptions(all=True, kernel="flow").cases()
    for one, other in zip(plain, flow, strict=True):
        assert other.problem.name == f"{one.problem.name}, flow"
        assert other.problem.sampler == dataclasses.replace(one.problem.sampler, kernel="flow")
        assert dataclasses.replace(other, problem=one.problem, truth=one.truth) == one
        assert (other.truth is None) == (one.truth is None)
    (case,) = VerifyOptions(kernel="flow", problem="gaussian", sde="flow_grpo", eta=0.7, num_steps=10).cases()
    assert case.problem.sampler == Sampler(num_steps=10, eta=0.7, kernel="flow", sde="flow_grpo")
    with pytest.raises(ConfigError, match="give --kernel flow"):
        VerifyOptions(problem="gaussian", sde="flow_grpo").cases()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"means": (0.0,)}, "--means.*--problem"),
        ({"all": True, "problem": "gaussian"}, "--all runs every problem"),
        ({"pipeline": "shapes", "all": True}, "comparison of their own"),
        ({"adapter": "x", "problem": "logistic"}, "comparison of their own"),
        ({"max_pool_samples": 100, "classifier": ("a=b",)}, "--max-pool-samples, --classifier belong to.*--adapter"),
        ({"adapter": "x", "num_samples": 15}, "num_samples is 15; expected at least 16"),
        ({"adapter": "x", "max_pool_samples": 19}, "max_pool_samples is 19; expected at least 20"),
        ({"error_budget": True, "all": True}, "one problem"),
        ({"adapter": "x", "kernel": "flow"}, "--kernel is of the problems"),
        ({"error_budget": True, "kernel": "flow"}, "--kernel is of the problems"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], message: str) -> None:
    """Before anything starts."""
    with pytest.raises(ConfigError, match=message):
        VerifyOptions(**flags)


def test_what_is_asked_of_an_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The given adapter, with the flags; --pipeline shapes alone trains one first."""
    asked: list[Question] = []

    def verify_pipeline(folder: Path, question: Question, say: Any) -> dict[str, Any]:
        asked.append(question)
        return {"classes": [], "bar": {"met": True}}

    monkeypatch.setattr("ctrl_ray.verification.pipeline.verify_pipeline", verify_pipeline)
    monkeypatch.setattr(verify, "train_exact", lambda folder, seed: folder / f"trained with seed {seed}")
    (tmp_path / "prompts.txt").write_text("a\nb\n")
    flags: dict[str, Any] = {"json": True, "output_dir": str(tmp_path), "seed": 7, "num_samples": 32}
    of_adapters = {"max_pool_samples": 99, "prompts_file": str(tmp_path / "prompts.txt"), "classifier": ("hue=C",)}
    assert verify.verify(VerifyOptions(adapter="RUN/adapter", **flags, **of_adapters))
    assert verify.verify(VerifyOptions(pipeline="shapes", **flags))
    assert verify.verify(VerifyOptions(pipeline="shapes", adapter="RUN/adapter", **flags))
    common: dict[str, Any] = {"num_samples": 32, "seed": 7}
    assert asked == [
        Question(adapter="RUN/adapter", max_pool_samples=99, prompts=("a", "b"), classifiers={"hue": "C"}, **common),
        Question(adapter=str(tmp_path / "run" / "trained with seed 7"), **common),
        Question(adapter="RUN/adapter", **common),
    ]


def test_a_mistake_in_the_flags_is_one_line_and_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line."""
    arguments = ["--problem", "logistic", "--means", "0", "1", "--stds", "1", "--weights", "1", "1"]
    assert verify.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: a mixture needs as many means (2) as stds (1)") and len(error.splitlines()) == 1
