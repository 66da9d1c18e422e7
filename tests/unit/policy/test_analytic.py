"""The closed-form denoiser and the push on top of it."""

from __future__ import annotations

import pytest
import torch

from ctrl_ray.config import SamplerConfig
from ctrl_ray.diffusion.flow import FlowKernel, flow_sigmas
from ctrl_ray.diffusion.steps import step_kl
from ctrl_ray.errors import ConfigError
from ctrl_ray.exact.chain import reference_chain
from ctrl_ray.exact.problems import Sampler
from ctrl_ray.exact.suite import THREE_MODES
from ctrl_ray.gradients.rollout import policy_step
from ctrl_ray.policy.analytic import (
    AnalyticPolicy,
    MixtureDenoiser,
    MixtureEncoder,
    MixtureVelocity,
    analytic_scheduler,
)
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.policy.schedule import load_kernel

STEPS = 10


def _policy(dimension: int = 2) -> tuple[AnalyticPolicy, object, MixtureEncoder]:
    scheduler = analytic_scheduler()
    kernel = load_kernel(scheduler, SamplerConfig(num_steps=STEPS))
    denoiser = MixtureDenoiser(THREE_MODES.means, THREE_MODES.stds, scheduler.alphas_cumprod)
    policy = AnalyticPolicy(denoiser, kernel, {"first": 2, "second": 1}, dimension=dimension, num_nodes=9)
    return policy, kernel, MixtureEncoder({"p": THREE_MODES.weights, "q": (1.0, 1e-9, 1e-9)})


def test_reference_steps_are_those_of_the_solver() -> None:
    """Two implementations of the same chain: numpy in float64, and the denoiser with the library's DDIM kernel."""
    policy, kernel, encoder = _policy()
    policy.double()
    chain = reference_chain(THREE_MODES, Sampler(num_steps=STEPS))
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    labels = torch.zeros(50, 2, dtype=torch.long)
    for k, step in enumerate(chain):
        ours = policy_step(policy, kernel, k, x, Inputs(encoder.encode(["p"] * 50), labels), reference=True)  # type: ignore[arg-type]
        assert int(kernel.time(k)) == step.time  # type: ignore[attr-defined]
        assert kernel.std(k) == pytest.approx(step.std, rel=1e-5)  # type: ignore[attr-defined]
        torch.testing.assert_close(ours.mean.numpy(), step.mean(x.numpy()), atol=2e-6, rtol=2e-6)


FLOWS = [
    Sampler(num_steps=STEPS, kernel="flow"),
    Sampler(num_steps=STEPS, kernel="flow", eta=0.6, shift=1.0),
    Sampler(num_steps=STEPS, kernel="flow", sde="cps", eta=0.8),
    Sampler(num_steps=STEPS, kernel="flow", sde="flow_grpo", eta=0.7),
    Sampler(num_steps=STEPS, kernel="flow", sde="constant", eta=0.5),
]


@pytest.mark.parametrize("sampler", FLOWS, ids=lambda sampler: f"{sampler.sde} {sampler.eta}")
def test_steps_of_a_flow_are_those_of_the_solver(sampler: Sampler) -> None:
    """The same for flow matching: the exact velocity with `FlowKernel`. A push moves the mean by that many deviations there
    too, and the last step has none."""
    kernel = FlowKernel(flow_sigmas(STEPS, shift=sampler.shift), sde=sampler.sde, eta=sampler.eta, reference_steps=1)
    denoiser = MixtureVelocity(THREE_MODES.means, THREE_MODES.stds)
    policy = AnalyticPolicy(denoiser, kernel, {"first": 1}, dimension=2, num_nodes=9).double()
    policy.pushes["first"].data[:] = 0.7
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    encoder, labels = MixtureEncoder({"p": THREE_MODES.weights}), torch.zeros(50, 1, dtype=torch.long)
    inputs = Inputs(encoder.encode(["p"] * 50), labels)
    for k, step in enumerate(reference_chain(THREE_MODES, sampler)):
        ref, pushed = (policy_step(policy, kernel, k, x, inputs, reference=reference) for reference in (True, False))
        assert float(kernel.time(k)) == pytest.approx(step.time, rel=1e-6)
        assert kernel.std(k) == pytest.approx(step.std, rel=1e-12)
        torch.testing.assert_close(ref.mean.numpy(), step.mean(x.numpy()), atol=2e-6, rtol=2e-6)
        torch.testing.assert_close(pushed.mean - ref.mean, torch.full_like(x, 0.7 * step.std), atol=1e-9, rtol=1e-9)
    assert step.std == 0 and not kernel.controlled(STEPS - 1)


def test_policy_equals_reference_at_the_start_and_prompts_choose_the_weights() -> None:
    """Bit for bit; another prompt, another denoiser."""
    policy, kernel, encoder = _policy()
    x, labels = torch.randn(8, 2), torch.zeros(8, 2, dtype=torch.long)
    inputs = Inputs(encoder.encode(["p"] * 8), labels)
    ours = policy(x, kernel.time(3), inputs, reference=False)  # type: ignore[attr-defined]
    ref = policy(x, kernel.time(3), inputs, reference=True)  # type: ignore[attr-defined]
    assert torch.equal(ours.prediction, ref.prediction)
    other = policy(x, kernel.time(3), Inputs(encoder.encode(["q"] * 8), labels), reference=True)  # type: ignore[attr-defined]
    assert not torch.allclose(other.prediction, ref.prediction)
    with pytest.raises(ConfigError, match="unknown"):
        encoder.encode(["unknown"])


def test_a_push_moves_the_mean_by_that_many_deviations_and_costs_half_its_square() -> None:
    """KL of a step = u² / 2 in nats for each coordinate; the null label has no push, controls add up."""
    policy, kernel, encoder = _policy()
    policy.pushes["first"].data[1, 4] = 0.7
    policy.pushes["second"].data[0, 4] = 0.2
    x = torch.randn(4, 2)
    labels = torch.tensor([[1, 0], [1, 1], [0, 1], [2, 1]])  # (class, class), (class, null), (untouched, null), nulls
    at = (policy, kernel, 4, x, Inputs(encoder.encode(["p"] * 4), labels))
    step, ref = policy_step(*at, reference=False), policy_step(*at, reference=True)  # type: ignore[arg-type]
    pushes = (step.mean - ref.mean) / kernel.std(4)  # type: ignore[attr-defined]
    torch.testing.assert_close(pushes, torch.tensor([[0.9], [0.7], [0.0], [0.0]]).expand(-1, 2), atol=2e-4, rtol=0)
    torch.testing.assert_close(step_kl(step, ref), pushes.square().sum(1) / 2, atol=1e-5, rtol=1e-4)


def test_the_push_is_piecewise_linear_in_each_coordinate_alone() -> None:
    """Between nodes it interpolates; moving one coordinate leaves the other's push."""
    policy, _, _ = _policy()
    low, high = policy._ranges[4]
    nodes = torch.linspace(low, high, 9)
    policy.pushes["first"].data[0, 4, 0] = torch.arange(9.0)
    policy.pushes["first"].data[0, 4, 1] = 1.0
    x = torch.stack([(nodes[:-1] + nodes[1:]) / 2, torch.zeros(8)], dim=1)
    push = policy._push(x, torch.zeros(8, 2, dtype=torch.long), 4)
    torch.testing.assert_close(push[:, 0], torch.arange(8.0) + 0.5, atol=1e-4, rtol=0)
    torch.testing.assert_close(push[:, 1], torch.ones(8))
