"""What fixed step variances cost, against the published answers and by hand."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrl_ray.diffusion.noise import draw_noise
from ctrl_ray.diffusion.steps import GaussianStep, ModelOutput
from ctrl_ray.exact.chain import reference_chain
from ctrl_ray.exact.grid import solve_on_grid
from ctrl_ray.exact.suite import Case, gaussian, logistic
from ctrl_ray.gradients.rollout import keyed_noise, rollout
from ctrl_ray.gradients.variance_cost import variance_cost
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.rewards.analytic import log_prob
from tests.analytic import make_learner

NODES, PATHS = 200, 8192


@pytest.mark.full
@pytest.mark.parametrize(
    ("case", "expected"),
    [(gaussian(), 0.0189), (logistic(), 0.0132), (logistic(4.0), 0.0332)],
    ids=["T1", "T4", "T4, γ 4"],
)
def test_it_is_what_was_published(case: Case, expected: float) -> None:
    """Along paths of the best policy of fixed variance, whose pushes stand at the nodes."""
    problem = case.problem
    learner, policy = make_learner(dataclasses.replace(case, effort=dataclasses.replace(case.effort, num_nodes=NODES)))
    solution = solve_on_grid(problem, num_bins=600)
    (pushes,) = policy.pushes.values()
    for k, step in enumerate(reference_chain(problem.mixture, problem.sampler)):
        nodes = np.linspace(*policy._ranges[k], NODES)
        best = np.interp(nodes, solution.grid.centres, solution.policy_means[k])
        pushes.data[0, k, 0] = torch.from_numpy((best - step.mean(nodes[:, None])[:, 0]) / step.std)
    prompts, labels = [learner.prompts[0]] * PATHS, torch.zeros(PATHS, 1, dtype=torch.long)
    noise = keyed_noise(0, 0, range(PATHS), policy.latent_shape, learner.kernel.num_steps)
    trajectory = rollout(policy, learner.kernel, Inputs(learner.encoder.encode(prompts), labels), noise)
    exponent = problem.guidance_strengths[0] / problem.kl_coef
    log_tilt = lambda latents: exponent * log_prob(problem.rewards[0], latents[:, 0])  # noqa: E731
    probes = draw_noise(1, 0, range(PATHS), "probes", (8, 1)).transpose(0, 1)
    costs = variance_cost(policy, learner.kernel, trajectory, log_tilt, probes)
    assert costs.shape == (PATHS,) and costs.dtype == torch.float64
    error = float(costs.std()) / PATHS**0.5
    assert error < 0.06 * expected
    assert float(costs.mean()) == pytest.approx(expected, abs=3 * error + 0.1 * expected)


@dataclasses.dataclass(frozen=True)
class Line:
    """Kernel and policy in one: the mean of a step is a multiple of the latents; the policy's has another factor."""

    factors: tuple[float, ...]
    pushed: tuple[float, ...]
    """Of the steps that the policy takes, which are the first."""
    std_of_all: float = 0.7

    @property
    def num_steps(self) -> int:
        return len(self.factors)

    def std(self, step_index: int) -> float:
        return self.std_of_all

    def controlled(self, step_index: int) -> bool:
        return step_index < len(self.pushed)

    def time(self, step_index: int, device: Any = "cpu") -> Tensor:
        return torch.tensor(step_index, device=device)

    def step(self, step_index: int, latents: Tensor, output: ModelOutput) -> GaussianStep:
        return GaussianStep(output.prediction, torch.tensor(self.std_of_all))

    def __call__(self, latents: Tensor, time: Tensor, inputs: Inputs, *, reference: bool) -> ModelOutput:
        return ModelOutput((self.factors if reference else self.pushed)[int(time)] * latents)


def test_every_step_by_hand() -> None:
    """Two steps of the policy's, then two of the reference's."""
    line, curvature, mirrored = Line((0.9, 0.8, 1.1, 0.5), (0.6, 0.7)), 3.0, 2000
    generator = torch.Generator().manual_seed(0)
    noise, more = torch.randn(4 + 1, 8, 3, generator=generator), torch.randn(mirrored, 8, 3, generator=generator)
    policy, inputs = cast(Any, line), cast(Any, None)
    trajectory = rollout(policy, line, inputs, lambda index: noise[index])

    def log_tilt(latents: Tensor) -> Tensor:  # what is linear, and what is as high on both sides, costs nothing
        return 5 * latents.sum(1) - curvature * latents.square().sum(1) / 2

    costs = variance_cost(policy, line, trajectory, log_tilt, more)
    variance = line.std(0) ** 2
    slope = 0.8 * (0.7 - 0.8)  # of σ² ∇V before the second step
    first = slope**2 / 4 * (noise[1] * more[0]).sum(1).square().double()
    bent = variance * curvature * (1.1 * 0.5) ** 2
    second = 3 * (bent - np.log1p(bent)) / 2  # of three coordinates
    assert float((costs - first).mean()) == pytest.approx(second, rel=0.05)
    assert float(first.min()) > 0 and second > 0.1
