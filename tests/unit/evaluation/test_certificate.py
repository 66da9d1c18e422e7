"""The distance to the target, against problems whose answer is known, and the weights' diagnostics by themselves."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

from ctrl_ray.config import ControlConfig
from ctrl_ray.evaluation.certificate import (
    GROUP_SIZE,
    Paths,
    certify,
    certify_evaluation,
    certify_targets,
    effective_sample_size,
    label_targets,
    log_mean_weight,
    pareto_k,
)
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.exact.chain import reference_chain
from ctrl_ray.exact.grid import Solution, solve_on_grid
from ctrl_ray.exact.problems import Problem
from ctrl_ray.exact.suite import gaussian, logistic, two_controls

PROBLEMS = {
    "T1": gaussian().problem,
    "T4": logistic().problem,
    "T4, γ 4": logistic(4.0).problem,
    "T5": two_controls().problem,
}
GAPS = {"T1": 0.0278, "T4": 0.0204, "T4, γ 4": 0.0469, "T5": 0.0339}
"""Of the best policy of fixed variance at 50 steps: published with the problems."""


@functools.cache
def _solutions(name: str) -> tuple[Solution, ...]:
    problem = PROBLEMS[name]
    return tuple(solve_on_grid(problem, coordinate, num_bins=600) for coordinate in range(len(problem.rewards)))


def _log_z(name: str) -> float:
    return sum(solution.log_z for solution in _solutions(name)) / PROBLEMS[name].kl_coef


def _tilt(problem: Problem, x: np.ndarray) -> np.ndarray:
    """(n, coordinates) → (n,)."""
    rewards = zip(problem.rewards, problem.guidance_strengths, x.T, strict=True)
    return sum(
        (strength / problem.kl_coef * reward.log_prob(column) for reward, strength, column in rewards), start=0.0
    )


def _paths(name: str, count: int, seed: int, *, pre_trained: bool) -> Paths:
    """Of the pre-trained model, or of the best policy of fixed variance."""
    problem, rng = PROBLEMS[name], np.random.default_rng(seed)
    x, log_ratios = rng.standard_normal((count, len(problem.rewards))), np.zeros(count)
    for k, step in enumerate(reference_chain(problem.mixture, problem.sampler)):
        z, reference, best = rng.standard_normal(x.shape), step.mean(x), _best_mean(name, k, x)
        push = (best - reference) / step.std
        log_ratios += (z * push + (-0.5 if pre_trained else 0.5) * push**2).sum(1)
        x = (reference if pre_trained else best) + step.std * z
    return Paths(_tilt(problem, x), log_ratios)


def _best_mean(name: str, step: int, x: np.ndarray) -> np.ndarray:
    solutions = zip(_solutions(name), x.T, strict=True)
    return np.stack([np.interp(column, s.grid.centres, s.policy_means[step]) for s, column in solutions], axis=1)


@pytest.mark.full
@pytest.mark.parametrize("name", list(GAPS))
def test_the_gap_of_the_best_policy_is_the_published_one(name: str) -> None:
    certificate = certify(_paths(name, 10_000, 1, pre_trained=False), _paths(name, 10_000, 0, pre_trained=True))
    truth, gap = _log_z(name), certificate.gap
    print(f"{name}: gap {gap.value:.4f} ± {gap.standard_error:.4f}, log Z {certificate.log_z}, truth {truth:.4f}")
    assert gap.standard_error <= 0.005
    assert abs(gap.value - GAPS[name]) <= 3 * gap.standard_error
    assert abs(certificate.log_z.value - truth) <= 3 * certificate.log_z.standard_error
    assert certificate.objective.value < certificate.lower.value
    assert certificate.upper is not None
    assert certificate.lower.value <= truth + 3 * certificate.lower.standard_error
    assert certificate.upper.value >= truth - 3 * certificate.upper.standard_error
    assert certificate.ess == pytest.approx(math.exp(-2 * gap.value), abs=0.03)
    assert certificate.pareto_k < 0.5


@pytest.mark.full
@pytest.mark.parametrize("name", ["T1", "T4", "T5"])
def test_log_z_is_within_three_of_its_errors(name: str) -> None:
    """In at least 97 of 100 repeats of 1024 paths, of the pre-trained model and of a policy near the optimum."""
    truth = _log_z(name)
    pre_trained, policy = _paths(name, 102_400, 2, pre_trained=True), _paths(name, 102_400, 3, pre_trained=False)
    for log_weights in (pre_trained.log_tilts, policy.log_weights):
        estimates = [log_mean_weight(repeat) for repeat in log_weights.reshape(100, 1024)]
        errors = np.array([(value - truth) / standard_error for value, standard_error in estimates])
        assert np.sum(np.abs(errors) <= 3) >= 97
        assert 0.75 < errors.std() < 1.3  # no error is simply large


def test_weights_by_hand() -> None:
    log_weights = np.log([1.0, 2.0, 3.0]) + 1000.0  # no overflow
    assert effective_sample_size(log_weights) == pytest.approx(36 / 14)
    value, error = log_mean_weight(log_weights)
    assert value == pytest.approx(1000 + math.log(2))
    assert error == pytest.approx(math.sqrt(14 / 36 - 1 / 3))
    equal = log_mean_weight(np.full(50, -3.0))
    assert equal.value == pytest.approx(-3) and equal.standard_error == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("shape", [0.2, 0.5, 1.0])
def test_the_tails_shape_is_found(shape: float) -> None:
    """Of weights that are generalised Pareto themselves: u^(-shape)."""
    found = [pareto_k(-shape * np.log(np.random.default_rng(seed).uniform(size=10_000))) for seed in range(20)]
    assert np.mean(found) == pytest.approx(shape, abs=0.06)
    assert np.std(found) < 0.15


def test_too_few_weights_or_equal_ones_have_no_tail() -> None:
    assert math.isnan(pareto_k(np.arange(10.0)))
    assert pareto_k(np.zeros(1000)) == float("-inf")
    assert pareto_k(1e-12 * np.random.default_rng(0).normal(size=1000)) == float("-inf")  # equal but for rounding


def test_heavy_weights_and_loose_bounds_are_said() -> None:
    rng = np.random.default_rng(0)
    pre_trained = Paths(rng.normal(-1.0, 0.3, size=512), None)

    def policy(mean: float, std: float, count: int = 512) -> Paths:
        return Paths(rng.normal(mean, std, size=count), np.zeros(count))

    near = certify(policy(-1.0, 0.05), pre_trained)
    assert not near.too_wide and near.lower.value >= near.objective.value and near.upper is None
    far = certify(policy(-3.0, 3.0), pre_trained)
    assert far.pareto_k > 0.7 and far.too_wide
    few = certify(policy(-1.0, 0.05, count=20), pre_trained)
    assert math.isnan(few.pareto_k) and few.too_wide  # too few to know
    assert few.lower == few.objective  # fewer than two groups of GROUP_SIZE
    assert GROUP_SIZE == 16


def test_both_kinds_of_paths_give_log_z_where_either_alone_is_poor() -> None:
    """A target of two parts, of which the policy knows one: its own weights miss log 2 and do not notice."""
    rng, n = np.random.default_rng(0), 4000
    # The pre-trained law is N(0, 1), the target N(0, 1) tilted by cosh(3 x): halves at ±3. The policy is N(3, 1).
    x, z = rng.normal(size=n), rng.normal(3.0, 1.0, size=n)
    truth = 4.5

    def paths(values: np.ndarray) -> Paths:
        return Paths(np.logaddexp(3 * values, -3 * values) - math.log(2), 3 * values - 4.5)

    blind = log_mean_weight(paths(z).log_weights)
    assert abs(blind.value - (truth - math.log(2))) < 0.1 and blind.standard_error < 0.2
    certificate = certify(paths(z), paths(x))
    assert abs(certificate.log_z.value - truth) <= 3 * certificate.log_z.standard_error
    alone = log_mean_weight(paths(x).log_tilts)
    assert certificate.log_z.standard_error < alone.standard_error
    assert certificate.gap.value == pytest.approx(math.log(2), abs=3 * certificate.gap.standard_error)


@pytest.mark.full
def test_several_controls_and_null_labels_are_certified_together() -> None:
    """T5's controls, each asked for or not: the gap is the mean of the sums of the asked ones' gaps."""
    name, n = "T5", 8000
    problem = PROBLEMS[name]
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, size=(n, 2))  # one class each: 0 asks for it, 1 is the null label
    x, log_ratios = rng.standard_normal((n, 2)), np.zeros(n)
    for k, step in enumerate(reference_chain(problem.mixture, problem.sampler)):
        z, reference = rng.standard_normal(x.shape), step.mean(x)
        push = np.where(labels == 0, (_best_mean(name, k, x) - reference) / step.std, 0)
        log_ratios += (z * push + push**2 / 2).sum(1)
        x = reference + step.std * (push + z)
    exponents = dict(zip(("a", "b"), (s / problem.kl_coef for s in problem.guidance_strengths), strict=True))

    def log_probs(values: np.ndarray) -> dict[str, np.ndarray]:
        rewards = zip(("a", "b"), problem.rewards, values.T, strict=True)
        return {control: reward.log_prob(column)[:, None] for control, reward, column in rewards}

    pre_trained = rng.standard_normal((n, 2))
    for step in reference_chain(problem.mixture, problem.sampler):
        pre_trained = step.mean(pre_trained) + step.std * rng.standard_normal(x.shape)
    targets, log_tilts = label_targets(labels, exponents, log_probs(pre_trained))
    assert len(log_tilts) == 4 and np.all(log_tilts[3] == 0)  # nothing is asked
    values = log_probs(x)
    tilts = sum(
        exponent * np.where(labels[:, c] == 0, values[control][:, 0], 0)
        for c, (control, exponent) in enumerate(exponents.items())
    )
    certificate = certify_targets(tilts - log_ratios, targets, log_tilts)
    gaps = [s.log_z / problem.kl_coef - s.optimum.objective / problem.kl_coef for s in _solutions(name)]
    expected = float(np.mean((labels == 0) @ np.array(gaps)))
    gap = certificate.gap
    assert abs(gap.value - expected) <= 3 * gap.standard_error and gap.standard_error < 0.03
    truth = float(np.mean((labels == 0) @ np.array([s.log_z / problem.kl_coef for s in _solutions(name)])))
    assert abs(certificate.log_z.value - truth) <= 3 * certificate.log_z.standard_error
    assert certificate.objective.value <= certificate.lower.value <= truth + 3 * certificate.lower.standard_error
    assert certificate.ess > 0.9 and certificate.pareto_k < 0.5


def test_targets_are_the_combinations_of_labels() -> None:
    rng = np.random.default_rng(0)
    probs = {"size": rng.normal(size=(5, 2)), "colour": rng.normal(size=(5, 3))}
    labels = np.array([[0, 3], [1, 2], [0, 3], [2, 0]])  # 2 and 3 are null
    targets, log_tilts = label_targets(labels, {"size": 2.0, "colour": 0.5}, probs)
    expected = [
        2 * probs["size"][:, 0],
        2 * probs["size"][:, 1] + 0.5 * probs["colour"][:, 2],
        0.5 * probs["colour"][:, 0],
    ]
    assert targets.tolist() == [0, 1, 0, 2]
    np.testing.assert_allclose(log_tilts, expected)


def test_weights_of_different_targets_are_compared_by_their_own_z() -> None:
    """A perfect sampler of two targets whose Z differ by e^5 has no gap and all of its samples."""
    log_tilts = np.stack([np.full(64, -1.0), np.full(64, -6.0)])
    targets = np.arange(64) % 2
    certificate = certify_targets(np.where(targets == 0, -1.0, -6.0), targets, log_tilts)
    assert certificate.gap.value == pytest.approx(0) and certificate.gap.standard_error == pytest.approx(0, abs=1e-12)
    assert certificate.ess == pytest.approx(1)
    assert certificate.log_z.value == pytest.approx(-3.5) == certificate.objective.value


def test_an_evaluation_is_certified_overall_and_by_class() -> None:
    """Two controls, one of them sometimes not asked for; every number from its definition."""
    rng = np.random.default_rng(0)
    size = ControlConfig(classes=("small", "large"), guidance_strength=4.0)
    colour = ControlConfig(classes=("red", "green", "blue"), guidance_strength=1.0)
    controls = {"size": size, "colour": colour}
    before, after = _samples(rng, None), _samples(rng, rng.normal(size=48))
    found = certify_evaluation(before, after, controls, kl_coef=2.0)
    keys = {f"certificate/size/{name}" for name in size.classes} | {
        f"certificate/colour/{name}" for name in colour.classes
    }
    assert {key for key in found if "/" in key} == keys
    assert after.log_ratio is not None
    asked = np.pad(after.class_log_probs["colour"], ((0, 0), (0, 1)))[np.arange(48), after.labels[:, 1]]
    log_weights = 2 * after.class_log_probs["size"][np.arange(48), after.labels[:, 0]] + 0.5 * asked - after.log_ratio
    for label, name in enumerate(size.classes):
        rows = after.labels[:, 0] == label
        part = found[f"certificate/size/{name}"]
        assert part["objective"] == pytest.approx(log_weights[rows].mean())
        second = [
            np.log(np.mean(np.exp(2 * before.class_log_probs["size"][:, label] + 0.5 * other)))
            for other in (*before.class_log_probs["colour"].T, 0.0)
        ]
        assert part["log_z"] == pytest.approx(np.mean([second[index] for index in after.labels[rows, 1]]))
        assert part["gap"] == pytest.approx(part["log_z"] - part["objective"])
    shares = [np.mean(after.labels[:, 0] == label) for label in (0, 1)]
    parts = [found[f"certificate/size/{name}"]["gap"] for name in size.classes]
    assert found["gap"] == pytest.approx(np.dot(shares, parts))
    assert certify_evaluation(before, _samples(rng, None), controls, kl_coef=2.0) == {}


def _samples(rng: np.random.Generator, log_ratio: np.ndarray | None, count: int = 48) -> EvaluationSamples:
    beliefs = {"size": rng.dirichlet((1, 1), size=count), "colour": rng.dirichlet((1, 1, 1), size=count)}
    return EvaluationSamples(
        images=np.zeros((count, 2, 2, 3), dtype=np.uint8),
        prompts=("a",) * count,
        labels=np.stack([np.arange(count) % 2, np.arange(count) // 2 % 4], axis=1),
        kl=np.zeros(count),
        class_log_probs={name: np.log(values).astype(np.float32) for name, values in beliefs.items()},
        sample_ids=np.arange(count),
        log_ratio=log_ratio,
    )
