"""What a classifier that is not shown the prompt converges to, and what it does to the target."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.special import expit

from ctrl_ray.errors import ConfigError
from ctrl_ray.exact.grid import solve_on_grid
from ctrl_ray.exact.problems import ComponentReward, LogisticReward, Mixture, Problem, Sampler
from ctrl_ray.exact.prompts import MarginalReward, PromptRule
from ctrl_ray.exact.suite import GAUSSIAN, PROMPT_RULES, TWO_MODES, PromptName, prompt_dependent
from tests.unit.exact.quadrature import solve_by_quadrature

RULES = (
    PromptRule(share=1.0, mixture=Mixture((-1.0, 1.0), (0.8, 0.5), (0.7, 0.3)), reward=LogisticReward(1.5, -1.0)),
    PromptRule(share=3.0, mixture=Mixture((-1.0, 1.0), (0.8, 0.5), (0.2, 0.8)), reward=LogisticReward(1.0, 2.0)),
)


def test_the_marginal_is_how_often_the_label_occurs_near_an_x_whatever_the_prompt() -> None:
    """200,000 draws of (c, x, y), the shares 1 : 3: in each of 20 bins of x within 4 standard errors."""
    rng = np.random.default_rng(0)
    prompt = (rng.uniform(size=200_000) < 0.75).astype(int)
    second = rng.uniform(size=len(prompt)) < np.array([0.3, 0.8])[prompt]
    x = np.where(second, rng.normal(1.0, 0.5, len(prompt)), rng.normal(-1.0, 0.8, len(prompt)))
    y = rng.uniform(size=len(prompt)) < np.where(prompt == 1, expit(x + 2.0), expit(1.5 * x - 1.0))
    expected = np.exp(MarginalReward(RULES).log_prob(x))
    order = np.argsort(x)
    for rows in np.array_split(order, 20):
        allowed = 4 * np.sqrt((expected[rows] * (1 - expected[rows])).mean() / len(rows))
        assert y[rows].mean() == pytest.approx(expected[rows].mean(), abs=allowed)


def test_weights_of_components_that_depend_on_the_prompt_average_to_their_mean() -> None:
    """T3: y is the component. Σ_c p(c|x) p(y|x,c) is then the posterior under the mixture of all prompts together."""
    x = np.linspace(-4, 4, 41)
    rules = [dataclasses.replace(rule, reward=ComponentReward(rule.mixture, 1)) for rule in RULES]
    together = Mixture((-1.0, 1.0), (0.8, 0.5), (0.25 * 0.7 + 0.75 * 0.2, 0.25 * 0.3 + 0.75 * 0.8))
    np.testing.assert_allclose(
        MarginalReward(tuple(rules)).log_prob(x), ComponentReward(together, 1).log_prob(x), atol=1e-12
    )
    for rule in rules:  # the right reward leaves every prompt's component alone: N(1, 0.5²) whatever its weight
        log_tilted = rule.mixture.log_density(x) + rule.reward.log_prob(x) - np.log(rule.mixture.probabilities[1])
        np.testing.assert_allclose(log_tilted, Mixture((1.0,), (0.5,), (1.0,)).log_density(x), atol=1e-12)


def test_without_dependence_there_is_nothing_to_lose() -> None:
    """One rule for all prompts is its own average, also where p(x|c) differs."""
    x = np.linspace(-6, 6, 25)
    same = tuple(dataclasses.replace(rule, reward=LogisticReward(1.0)) for rule in RULES)
    np.testing.assert_allclose(MarginalReward(same).log_prob(x), LogisticReward(1.0).log_prob(x), atol=1e-12)


@pytest.mark.parametrize("exponent", [1.0, 3.0])
def test_bias_is_the_covariance_with_the_ratio_of_the_rewards(exponent: float) -> None:
    """E_q̄[f] − E_q[f] = Cov_q[f, h] / E_q[h], of the sampler's own law (4 steps), for the mean and the accuracy."""
    rule = PROMPT_RULES["strict"]
    sampler = Sampler(num_steps=4)
    right = Problem(
        name="x", mixture=rule.mixture, rewards=(rule.reward,), sampler=sampler, guidance_strengths=(exponent,)
    )
    marginal = MarginalReward(tuple(PROMPT_RULES.values()))
    q, wrong = (
        solve_on_grid(dataclasses.replace(right, rewards=(reward,)), num_bins=200) for reward in (rule.reward, marginal)
    )
    x, law = q.grid.centres, q.tilt.law
    h = np.exp(exponent * (marginal.log_prob(x) - rule.reward.log_prob(x)))
    for f in (x, np.exp(rule.reward.log_prob(x))):
        predicted = (law @ (f * h) - (law @ f) * (law @ h)) / (law @ h)
        assert wrong.tilt.law @ f - law @ f == pytest.approx(predicted, abs=1e-9)
        assert abs(predicted) > 0.05


@pytest.mark.full
@pytest.mark.parametrize(
    ("prompt", "target", "best"),
    [
        (
            "strict",
            ((1.685, -0.982), (1.089, 0.716), (0.920, -0.243)),
            ((1.482, -1.006), (1.354, 0.524), (0.856, -0.246)),
        ),
        ("mild", ((1.125, 0.402), (1.591, -0.342), (0.785, 0.103)), ((1.045, 0.358), (1.648, -0.254), (0.761, 0.088))),
    ],
)
def test_the_problem_has_the_published_answers(prompt: PromptName, target: tuple, best: tuple) -> None:
    """Mean, std and P(x > 0) with the prompt, and how far they are off without it, by the quadrature."""
    right, wrong = (
        solve_by_quadrature(prompt_dependent(prompt, with_prompt=with_prompt).problem) for with_prompt in (True, False)
    )
    for name, published in (("tilt", target), ("optimum", best)):
        for quantity, (value, bias) in zip(("mean", "std", "p_positive"), published, strict=True):
            one, other = (getattr(getattr(answers, name), quantity) for answers in (right, wrong))
            assert (one, other - one) == pytest.approx((value, bias), abs=1.2e-3), (name, quantity)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="share of a prompt is 0"):
        PromptRule(share=0.0, mixture=TWO_MODES, reward=LogisticReward())
    with pytest.raises(ConfigError, match="got none"):
        MarginalReward(())
    with pytest.raises(ConfigError, match="needs one reward, got 1, and a dimension of at least 2, got 1"):
        Problem(name="x", mixture=GAUSSIAN, rewards=(LogisticReward(),), repeated=True)
