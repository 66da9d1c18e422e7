"""The exact answers by three ways that share the chain's equations only: in closed form, on the package's grid, and by the
quadrature of `quadrature.py` beside this file. "Published" is what the README and the method's notes print of them."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from ctrl_ray.config import FlowSDE
from ctrl_ray.errors import ConfigError
from ctrl_ray.exact.chain import reference_chain
from ctrl_ray.exact.gaussian import solve_gaussian
from ctrl_ray.exact.grid import make_grid, make_kernel, policy_answer, solve_on_grid, total_variation
from ctrl_ray.exact.problems import ComponentReward, GaussianReward, Mixture, Problem, Sampler
from ctrl_ray.exact.suite import TWO_MODES, component, gaussian, logistic, two_controls
from ctrl_ray.exact.witness import check_against_riccati
from tests.unit.exact.quadrature import solve_by_quadrature


@pytest.mark.full
def test_riccati_has_the_published_answers() -> None:
    """T1 at 50 and at 10 steps: target and best fixed-variance policy, KL; six digits are those of the quadrature."""
    problem = gaussian().problem
    fifty = solve_gaussian(problem)
    assert fifty.base.std**2 == pytest.approx(0.894, abs=5e-4)
    assert (fifty.tilt.mean, fifty.tilt.std) == pytest.approx((1.563, 0.442), abs=5e-4)
    assert (fifty.optimum.mean, fifty.optimum.std, fifty.optimum.kl) == pytest.approx((1.561, 0.454, 1.738), abs=5e-4)
    ten = solve_gaussian(dataclasses.replace(problem, sampler=Sampler(num_steps=10)))
    assert (ten.tilt.mean, ten.tilt.std) == pytest.approx((1.443, 0.425), abs=5e-4)
    assert (ten.optimum.mean, ten.optimum.std) == pytest.approx((1.434, 0.474), abs=5e-4)
    again = solve_by_quadrature(problem)
    for closed, other in ((fifty.tilt, again.tilt), (fifty.optimum, again.optimum)):
        assert (closed.mean, closed.std) == pytest.approx((other.mean, other.std), abs=1e-6)
    assert fifty.optimum.objective == pytest.approx(again.objective, abs=1e-6)
    assert fifty.tilt.objective == pytest.approx(again.log_z, abs=1e-6)


@pytest.mark.full
@pytest.mark.parametrize(("strength", "kl_coef"), [(1.0, 1.0), (4.0, 2.0)])
def test_grid_and_riccati_agree(strength: float, kl_coef: float) -> None:
    """Two solvers that share nothing but the chain."""
    problem = dataclasses.replace(
        gaussian().problem, guidance_strengths=(strength,), kl_coef=kl_coef, sampler=Sampler(num_steps=20)
    )
    closed, grid = solve_gaussian(problem), solve_on_grid(problem, num_bins=600)
    for name in ("base", "tilt", "optimum"):
        one, other = getattr(closed, name), getattr(grid, name)
        assert (other.mean, other.std) == pytest.approx((one.mean, one.std), abs=1e-3), name
        assert (other.kl, other.objective) == pytest.approx((one.kl, one.objective), abs=4e-3), name


@pytest.mark.full
@pytest.mark.parametrize(
    ("sde", "eta", "forgets"), [("ancestral", 1.0, True), ("flow_grpo", 2**0.5, True), ("flow_grpo", 0.7, False)]
)
def test_a_flow_reaches_its_tilt_where_it_forgets_its_noise(sde: FlowSDE, eta: float, *, forgets: bool) -> None:
    """T1 and T4 by flow matching. The ancestral step and Flow-GRPO's at √2 keep nothing of the noise at σ = 1: the best policy
    of T1 has the tilt's mean, and free kernels reach log Z. At 0.7, Flow-GRPO's own, they miss it by .018 nats, and T1's mean
    by .017."""
    sampler = Sampler(num_steps=10, kernel="flow", sde=sde, eta=eta)
    closed = solve_gaussian(dataclasses.replace(gaussian().problem, sampler=sampler))
    on_grid = solve_on_grid(dataclasses.replace(gaussian().problem, sampler=sampler), num_bins=600)
    assert check_against_riccati(dataclasses.replace(gaussian().problem, sampler=sampler), 0, on_grid)
    modes = solve_on_grid(dataclasses.replace(logistic().problem, sampler=sampler), num_bins=600)
    missed, kept = closed.tilt.mean - closed.optimum.mean, modes.log_z - modes.free.objective
    assert missed == pytest.approx(0.0 if forgets else 0.0173, abs=2e-4)
    assert kept == pytest.approx(0.0 if forgets else 0.018, abs=1e-3)
    assert modes.log_z == pytest.approx(math.log(0.5), abs=1e-6)
    if sde == "ancestral":
        assert (closed.tilt.mean, closed.tilt.std) == pytest.approx((1.3727, 0.4142), abs=1e-4)
        assert (closed.optimum.mean, closed.optimum.std) == pytest.approx((1.3727, 0.4776), abs=1e-4)


@pytest.mark.full
def test_the_second_witness_sees_every_gaussian_coordinate_and_a_grid_that_is_too_coarse() -> None:
    """Also where only the last steps are controlled; a grid of 60 bins is caught, and so is an answer to something else."""
    problem = dataclasses.replace(two_controls().problem, sampler=Sampler(num_steps=6))
    assert check_against_riccati(problem, 0, solve_on_grid(problem, 0, 600))
    assert not check_against_riccati(problem, 1, solve_on_grid(problem, 1, 60)), "a logistic reward has no closed form"
    turned = dataclasses.replace(problem, rewards=problem.rewards[::-1], guidance_strengths=(2.0, 1.0))
    assert check_against_riccati(turned, 1, solve_on_grid(turned, 1, 600))
    last = solve_on_grid(problem, 0, 600, controlled_from=4)
    assert check_against_riccati(problem, 0, last, controlled_from=4)
    with pytest.raises(ConfigError, match=r"disagree on the optimum .*, where 0\.\d+ is allowed"):
        check_against_riccati(problem, 0, last)
    with pytest.raises(ConfigError, match=r"on a grid of 60 bins of 0.2\d+, .* by the Riccati recursion.*too coarse"):
        check_against_riccati(problem, 0, solve_on_grid(problem, 0, 60))


@pytest.mark.full
def test_mixture_has_the_published_answers() -> None:
    """T4: tilt, best policy with free kernels, with fixed variances; their distance."""
    exact, solution = solve_by_quadrature(logistic().problem), solve_on_grid(logistic().problem, num_bins=600)
    for answer, witness, published in (
        (solution.tilt, exact.tilt, (0.8706, 1.517, 1.358)),
        (solution.free, exact.free, (0.8665, 1.499, 1.374)),
        (solution.optimum, exact.optimum, (0.8544, 1.463, 1.416)),
    ):
        assert (witness.p_positive, witness.mean, witness.std) == pytest.approx(published, abs=5e-4)
        found = (answer.p_positive, answer.mean, answer.std)
        assert found == pytest.approx((witness.p_positive, witness.mean, witness.std), abs=6e-4)
        assert found == pytest.approx(published, abs=6e-4)
    assert total_variation(solution.optimum.law, solution.tilt.law) == pytest.approx(0.0162, abs=2e-4)
    assert solution.log_z == pytest.approx(exact.log_z, abs=1e-6) == pytest.approx(math.log(0.5))  # by symmetry
    assert solution.free.objective == pytest.approx(exact.free_objective, abs=6e-4)
    assert solution.optimum.objective == pytest.approx(exact.objective, abs=6e-4)
    gap = (solution.log_z - solution.optimum.objective) / abs(solution.optimum.objective)
    assert solution.optimum.objective < solution.free.objective < solution.log_z
    assert (solution.free.objective - solution.optimum.objective) / abs(solution.optimum.objective) == pytest.approx(
        0.019, abs=1e-3
    )
    assert gap > 0.019


@pytest.mark.full
def test_component_reward_has_the_published_answers() -> None:
    """T3: the tilt of the discrete sampler's law, and the best fixed-variance policy."""
    exact, solution = solve_by_quadrature(component().problem), solve_on_grid(component().problem, num_bins=600)
    for answer, witness, published in (
        (solution.tilt, exact.tilt, (1.983, 0.461)),
        (solution.optimum, exact.optimum, (1.993, 0.460)),
    ):
        assert (witness.mean, witness.std) == pytest.approx(published, abs=7e-4)  # 0.4594, published one unit high
        assert (answer.mean, answer.std) == pytest.approx((witness.mean, witness.std), abs=6e-4)


@pytest.mark.full
def test_a_policy_is_no_better_than_the_optimum_and_the_reference_has_no_kl() -> None:
    """Any other means give a smaller objective; the reference's own give KL 0 and the base law."""
    problem = logistic(num_steps=10).problem
    solution = solve_on_grid(problem, num_bins=500)
    chain = reference_chain(problem.mixture, problem.sampler)
    means = [step.mean(solution.grid.centres) for step in chain]
    reference = policy_answer(problem, solution.grid, means)
    assert reference.kl == 0
    assert total_variation(reference.law, solution.base.law) < 1e-12
    for scale in (0.8, 1.2):
        moved = [r + scale * (best - r) for r, best in zip(means, solution.policy_means, strict=True)]
        assert policy_answer(problem, solution.grid, moved).objective < solution.optimum.objective


@pytest.mark.full
def test_propagated_law_is_that_of_simulated_trajectories() -> None:
    """100,000 trajectories of the base chain: mean, std and share above zero within their standard errors."""
    problem = dataclasses.replace(logistic(num_steps=10).problem, mixture=Mixture((-2.0, 1.0), (0.5, 0.4), (1.0, 2.0)))
    answer = solve_on_grid(problem, num_bins=600).base
    rng = np.random.default_rng(0)
    x = rng.normal(size=100_000)
    for step in reference_chain(problem.mixture, problem.sampler):
        x = step.mean(x) + step.std * rng.normal(size=len(x))
    assert answer.mean == pytest.approx(x.mean(), abs=4 * x.std() / len(x) ** 0.5)
    assert answer.std == pytest.approx(x.std(), abs=0.01)
    assert answer.p_positive == pytest.approx((x > 0).mean(), abs=0.005)


def test_kernel_rows_are_probabilities_and_keep_the_mean() -> None:
    """Also for a step far narrower than the grid, and for means outside it."""
    grid = make_grid(gaussian().problem, 400)
    for std in (0.9, 0.05, 0.003, 0.0):
        means = np.linspace(-4, 4, 400)
        kernel = make_kernel(grid, means, std)
        np.testing.assert_allclose(kernel.mass.sum(1), 1, atol=1e-12)
        np.testing.assert_allclose(kernel.expect(grid.centres), means, atol=grid.width)
    outside = make_kernel(grid, np.array([-100.0, 100.0]), 0.1)
    assert np.isfinite(outside.mass).all()


def test_what_makes_no_sense_is_refused() -> None:
    """One clear message each."""
    with pytest.raises(ConfigError, match="as many means"):
        Mixture((0.0, 1.0), (1.0,), (1.0,))
    with pytest.raises(ConfigError, match="positive"):
        Mixture((0.0,), (-1.0,), (1.0,))
    with pytest.raises(ConfigError, match="component 2"):
        ComponentReward(TWO_MODES, 2)
    with pytest.raises(ConfigError, match="eta"):
        Sampler(eta=0.0)
    with pytest.raises(ConfigError, match=r"eta is 1\.2; expected a number in \(0, 1\]"):
        Sampler(kernel="flow", eta=1.2)
    with pytest.raises(ConfigError, match="expected 2 to 1000"):
        Sampler(kernel="flow", num_steps=1)
    with pytest.raises(ConfigError, match="'cps' is one of flow matching; give --kernel flow"):
        Sampler(sde="cps")
    with pytest.raises(ConfigError, match="dimension is 1"):
        Problem(name="x", mixture=TWO_MODES, rewards=(GaussianReward(0, 1),) * 2, guidance_strengths=(1.0, 1.0))
    with pytest.raises(ConfigError, match="not Gaussian"):
        solve_gaussian(logistic().problem)
