"""Flags of `python -m ctrl_ray.verify`, and that wrong gradients are caught by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ctrl_ray import verify
from ctrl_ray.errors import ConfigError
from ctrl_ray.exact.problems import GaussianReward, LogisticReward
from ctrl_ray.exact.suite import all_cases, default_cases
from ctrl_ray.verification.pipeline import Question
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
        ({"pipeline": "shapes", "all": True}, "comparison of their own"),
        ({"adapter": "x", "problem": "logistic"}, "comparison of their own"),
        ({"max_pool_samples": 100, "classifier": ("a=b",)}, "--max-pool-samples, --classifier belong to.*--adapter"),
        ({"adapter": "x", "num_samples": 15}, "num_samples is 15; expected at least 16"),
        ({"adapter": "x", "max_pool_samples": 19}, "max_pool_samples is 19; expected at least 20"),
        ({"error_budget": True, "all": True}, "one problem"),
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
