"""Every estimator: what it costs, what it is unbiased for, where it comes to rest."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl_ray.config import EstimatorConfig, SamplerConfig, ScalingConfig, TrainConfig
from ctrl_ray.diffusion.steps import gaussian_log_prob
from ctrl_ray.distributed.update import drift_bound
from ctrl_ray.errors import ConfigError
from ctrl_ray.exact.grid import solve_on_grid
from ctrl_ray.exact.problems import Sampler
from ctrl_ray.exact.suite import Case, Effort, gaussian, logistic
from ctrl_ray.gradients import estimators
from ctrl_ray.gradients.adjoint import AdjointPlan, Estimator, TerminalReward, adjoint_pass
from ctrl_ray.gradients.estimators import make_estimator
from ctrl_ray.gradients.rollout import keyed_noise, policy_step, rollout
from ctrl_ray.policy.analytic import analytic_scheduler
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.policy.schedule import load_kernel
from tests.analytic import make_learner, means_on

ALL: dict[str, Callable[[], Estimator]] = {
    "full": estimators.Full,
    "full with kept graphs": lambda: estimators.Full(keep_graphs=True),
    "sticking_the_landing": estimators.StickingTheLanding,
    "last_k": lambda: estimators.LastK(2),
    "random_suffix": estimators.RandomSuffix,
    "adjoint_matching": estimators.AdjointMatching,
    "adjoint_matching of 3": lambda: estimators.AdjointMatching(3),
    "reinforce": estimators.Reinforce,
}


def _short(case: Case, num_steps: int, **effort: Any) -> Case:
    problem = dataclasses.replace(case.problem, sampler=Sampler(num_steps=num_steps))
    return dataclasses.replace(case, problem=problem, effort=Effort(**effort))


def _gradient(
    case: Case,
    estimator: Estimator,
    plan: AdjointPlan,
    batch_size: int,
    pushes: Tensor | None = None,
    policy_of: Callable[[Any], Any] = lambda policy: policy,
    double: bool = True,
    reference_steps: int = 0,
) -> Tensor:
    """Gradient at the pushes of one adjoint pass over `batch_size` trajectories."""
    learner, policy = make_learner(case)
    if reference_steps:
        sampler = dataclasses.replace(learner.config.sampler, reference_steps=reference_steps)
        learner = dataclasses.replace(learner, kernel=load_kernel(analytic_scheduler(), sampler))
    if double:
        policy.double()
    if pushes is not None:
        policy.pushes["first"].data.copy_(pushes)
    dtype = policy.pushes["first"].dtype
    prompts = tuple(learner.prompts) * batch_size
    labels = torch.zeros(batch_size, 1, dtype=torch.long)
    noise = keyed_noise(0, 0, range(batch_size), (1,), learner.kernel.num_steps)
    called = policy_of(policy)
    trajectory = rollout(
        called,
        learner.kernel,
        Inputs(learner.encoder.encode(prompts), labels),
        lambda k: noise(k).to(dtype),
        with_graphs=estimator.keep_graphs,
    )
    strengths = torch.full((batch_size, 1), case.problem.guidance_strengths[0])
    rewarded = learner.rewards.submit(trajectory.clean_latents, prompts, labels, strengths).result()
    assert rewarded.cotangent is not None
    adjoint_pass(
        called,
        learner.kernel,
        trajectory,
        TerminalReward((rewarded.log_probs * strengths).sum(1), rewarded.cotangent.to(dtype)),
        estimator,
        plan,
        kl_coef=case.problem.kl_coef,
        sample_weights=torch.full((batch_size,), 1 / batch_size, dtype=dtype),
        backward=lambda loss: loss.backward(),
        groups=torch.arange(batch_size) // 64,
    )
    gradient = policy.pushes["first"].grad
    assert gradient is not None or reference_steps, "no step is both visited and the policy's"
    return torch.zeros_like(policy.pushes["first"]) if gradient is None else gradient


class _Counted:
    """A policy that counts how often it is called, and how often a gradient comes back through it."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.latent_shape = policy, policy.latent_shape
        self.forwards = self.backwards = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.forwards += 1
        output = self.policy(*args, **kwargs)
        if output.prediction.requires_grad:
            output.prediction.register_hook(self._count)
        return output

    def _count(self, gradient: Tensor) -> None:
        self.backwards += 1


@pytest.mark.parametrize("reference_steps", [0, 2])
@pytest.mark.parametrize("name", ALL)
def test_counted_calls_are_the_stated_ones(name: str, reference_steps: int) -> None:
    """Forwards and backwards of the denoiser, rollout included, of every plan; also where the reference takes steps."""
    estimator, num_steps = ALL[name](), 6
    case = _short(gaussian(), num_steps, num_nodes=3)
    plans = {plan.stop_below: plan for plan in (estimator.plan(num_steps, 0, 0, i) for i in range(60))}
    assert len(plans) == (num_steps if name == "random_suffix" else 1)
    for plan in plans.values():
        counted: list[_Counted] = []

        def wrap(policy: Any, into: list[_Counted] = counted) -> _Counted:
            into.append(_Counted(policy))
            return into[-1]

        _gradient(case, estimator, plan, 2, policy_of=wrap, reference_steps=reference_steps)
        sampler = SamplerConfig(num_steps=num_steps, reference_steps=reference_steps)
        stated = estimator.calls(plan, load_kernel(analytic_scheduler(), sampler))
        assert (counted[0].forwards, counted[0].backwards) == (stated.forwards, stated.backwards)


@pytest.mark.parametrize(
    ("name", "forwards", "backwards"),
    [
        ("full", 18, 12),
        ("full with kept graphs", 12, 12),
        ("sticking_the_landing", 24, 18),
        ("last_k", 10, 4),
        ("adjoint_matching", 18, 12),
        ("adjoint_matching of 3", 15, 9),
        ("reinforce", 18, 6),
    ],
)
def test_costs_are_those_of_the_docstrings(name: str, forwards: int, backwards: int) -> None:
    """T = 6 steps, all under the policy's control: 3 T and 2 T of the full gradient, and so on."""
    estimator, kernel = ALL[name](), load_kernel(analytic_scheduler(), SamplerConfig(num_steps=6))
    assert estimator.calls(estimator.plan(6, 0, 0, 0), kernel)[:2] == (forwards, backwards)


def test_random_suffix_is_unbiased_over_its_draws() -> None:
    """Σ_K P(K) gradient(K) is the full gradient, to rounding."""
    num_steps, p_full = 5, 0.4
    case = _short(logistic(), num_steps, num_nodes=5)
    pushes = 0.3 * torch.randn(1, num_steps, 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimator = estimators.RandomSuffix(p_full)
    plans = {plan.stop_below: plan for plan in (estimator.plan(num_steps, 0, 0, i) for i in range(200))}
    assert sorted(plans) == list(range(num_steps))
    total, unweighted = torch.zeros_like(pushes), torch.zeros_like(pushes)
    for first, plan in plans.items():
        probability = p_full if first == 0 else (1 - p_full) / (num_steps - 1)
        total += probability * _gradient(case, estimator, plan, 16, pushes)
        kept = dataclasses.replace(plan, weights=tuple(float(weight > 0) for weight in plan.weights))
        unweighted += probability * _gradient(case, estimator, kept, 16, pushes)
    full = _gradient(case, estimators.Full(), estimators.Full().plan(num_steps, 0, 0, 0), 16, pushes)
    torch.testing.assert_close(total, full, rtol=1e-9, atol=1e-12)
    assert (unweighted - full).norm() > 0.1 * full.norm()  # without the weights it is biased


def test_sticking_the_landing_is_the_pathwise_gradient_of_log_w() -> None:
    """By autograd through the whole path, in float64: the policy's own density takes the latents' gradient, not the
    parameters'. It differs from the full gradient, whose mean it has."""
    num_steps, batch_size = 5, 16
    case = _short(logistic(4.0), num_steps, num_nodes=5)
    case = dataclasses.replace(case, problem=dataclasses.replace(case.problem, kl_coef=0.7))
    pushes = 0.3 * torch.randn(1, num_steps, 1, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found, full = (
        _gradient(case, estimator, estimator.plan(num_steps, 0, 0, 0), batch_size, pushes)
        for estimator in (estimators.StickingTheLanding(), estimators.Full())
    )
    learner, policy = make_learner(case)
    policy.double()
    policy.pushes["first"].data.copy_(pushes)
    frozen = copy.deepcopy(policy).requires_grad_(False)
    prompts, labels = tuple(learner.prompts) * batch_size, torch.zeros(batch_size, 1, dtype=torch.long)
    inputs = Inputs(learner.encoder.encode(prompts), labels)
    noise = keyed_noise(0, 0, range(batch_size), (1,), num_steps)
    latents = noise(0).double()
    log_ratio = torch.zeros(batch_size, dtype=torch.float64)
    for k in range(num_steps):
        step = policy_step(policy, learner.kernel, k, latents, inputs, reference=False)
        following = step.mean + step.std * noise(k + 1).double()
        for model, reference, sign in ((frozen, True, 1), (frozen, False, -1)):
            law = policy_step(model, learner.kernel, k, latents, inputs, reference=reference)
            log_ratio = log_ratio + sign * gaussian_log_prob(law, following)
        latents = following
    strengths = torch.full((batch_size, 1), case.problem.guidance_strengths[0])
    rewarded = learner.rewards.submit(latents.detach(), prompts, labels, strengths).result()
    assert rewarded.cotangent is not None
    objective = (latents * rewarded.cotangent.double()).sum() + case.problem.kl_coef * log_ratio.sum()
    (-objective / batch_size).backward()
    expected = policy.pushes["first"].grad
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert (found - full).norm() > 0.05 * full.norm()


def test_random_suffix_draws_k_with_the_stated_probabilities() -> None:
    """K = 0 with full_probability, the others alike."""
    estimator = estimators.RandomSuffix(0.3)
    draws = torch.tensor([estimator.plan(4, 0, update, 0).stop_below for update in range(4000)])
    shares = torch.bincount(draws, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.3, 0.7 / 3, 0.7 / 3, 0.7 / 3]), atol=0.025, rtol=0)


@pytest.mark.parametrize("name", [pytest.param("reinforce", marks=pytest.mark.full), "adjoint_matching of 3"])
def test_estimates_agree_with_what_they_estimate(name: str) -> None:
    """The score function against the full gradient; a choice of matched steps against all of them, on average."""
    num_steps = 4
    case = _short(gaussian(), num_steps, num_nodes=3)
    pushes = 0.4 * torch.randn(1, num_steps, 1, 3, generator=torch.Generator().manual_seed(1))
    if name == "reinforce":
        plan = estimators.Reinforce().plan(num_steps, 0, 0, 0)
        estimate = _gradient(case, estimators.Reinforce(), plan, 32_768, pushes, double=False)
        exact = _gradient(
            case, estimators.Full(), estimators.Full().plan(num_steps, 0, 0, 0), 32_768, pushes, double=False
        )
        assert (estimate - exact).norm() < 0.15 * exact.norm()
        return
    chosen = estimators.AdjointMatching(3)
    plans = [chosen.plan(num_steps, 0, update, 0) for update in range(300)]
    assert {sum(weight > 0 for weight in plan.weights) for plan in plans} == {3}
    mean_weights = torch.tensor([plan.weights for plan in plans]).mean(0)
    torch.testing.assert_close(mean_weights, torch.ones(num_steps), atol=0.15, rtol=0)


@pytest.mark.full
@pytest.mark.parametrize("name", ["full", "adjoint_matching", "sticking_the_landing"])
def test_the_fixed_variance_optimum_is_at_rest(name: str) -> None:
    """At the exact optimum of T4 the mean gradient is small beside that at the start."""
    num_steps, nodes = 10, 41
    case = _short(logistic(), num_steps, num_nodes=nodes)
    learner, policy = make_learner(case)
    solution = solve_on_grid(case.problem, num_bins=600)
    centres = solution.grid.centres
    reference = means_on(centres, learner, policy)
    pushes = torch.zeros(1, num_steps, 1, nodes)
    for k, (best, ref) in enumerate(zip(solution.policy_means, reference, strict=True)):
        low, high = policy._ranges[k]
        at = torch.linspace(low, high, nodes).double().numpy()
        wanted = (best - ref) / learner.kernel.std(k)
        pushes[0, k, 0] = torch.tensor([float(_interpolate(x, centres, wanted)) for x in at])
    plan = ALL[name]().plan(num_steps, 0, 0, 0)
    rest, start = (_gradient(case, ALL[name](), plan, 8192, at, double=False) for at in (pushes, None))
    assert rest.sum((0, 2, 3)).norm() < 0.06 * start.sum((0, 2, 3)).norm()


def _interpolate(x: float, grid: Any, values: Any) -> float:
    import numpy as np

    return float(np.interp(x, grid, values))


def test_makers_take_their_settings_and_refuse_what_does_not_fit() -> None:
    """By configuration; more steps than the sampler has is an error that names both."""
    assert make_estimator(EstimatorConfig(name="last_k", steps=3), 10).plan(10, 0, 0, 0).stop_below == 7
    assert (
        make_estimator(EstimatorConfig(name="random_suffix", full_probability=1.0), 5).plan(5, 0, 0, 0).stop_below == 0
    )
    for name in ("full", "sticking_the_landing", "adjoint_matching", "reinforce"):
        assert make_estimator(EstimatorConfig(name=name), 4).name == name  # type: ignore[arg-type]
    assert make_estimator(EstimatorConfig(keep_graphs=True), 4).keep_graphs
    with pytest.raises(ConfigError, match="keep_graphs is of the estimator full only"):
        EstimatorConfig(name="last_k", keep_graphs=True)
    for scaling in ({"zero_stage": 3}, {"gradient_checkpointing": "auto"}, {"precision": "fp16"}):
        (asked,) = scaling.items()
        with pytest.raises(ConfigError, match=f"got .*{asked[0]} {asked[1]}"):
            TrainConfig(estimator=EstimatorConfig(keep_graphs=True), scaling=ScalingConfig(**scaling))  # type: ignore[arg-type]
    for wrong in ({"max_drift": -1.0}, {"final_max_drift": 3.0}, {"name": "reinforce", "max_drift": 2.0}):
        with pytest.raises(ConfigError, match="max_drift"):
            EstimatorConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"max_drift is 2\.0 and kl_coef 0"):
        TrainConfig(kl_coef=0.0, estimator=EstimatorConfig(max_drift=2.0))
    growing = TrainConfig(num_updates=4, estimator=EstimatorConfig(max_drift=2.0, final_max_drift=32.0))
    assert [drift_bound(growing, update) for update in range(4)] == pytest.approx([2.0, 4.0, 8.0, 16.0])
    assert math.isinf(drift_bound(TrainConfig(), 3))
    with pytest.raises(ConfigError, match=r"12.*10 steps"):
        make_estimator(EstimatorConfig(name="last_k", steps=12), 10)
    with pytest.raises(ConfigError, match="group_size is 1"):
        TrainConfig(estimator=EstimatorConfig(name="reinforce"))
    with pytest.raises(ConfigError, match="divisor"):
        TrainConfig(group_size=5)
