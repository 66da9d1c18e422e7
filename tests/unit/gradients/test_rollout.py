"""What a rollout tells of its paths."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Independent, Normal

from ctrl_ray.diffusion.steps import GaussianStep, gaussian_log_prob, gaussian_sample, step_kl, step_log_ratio
from ctrl_ray.distributed.batches import evaluation_batch
from ctrl_ray.distributed.learner import Learner
from ctrl_ray.exact.suite import logistic
from ctrl_ray.gradients.rollout import Trajectory, keyed_noise, policy_step, rollout
from ctrl_ray.policy.analytic import AnalyticPolicy
from ctrl_ray.policy.protocol import Inputs
from tests.analytic import make_learner


def _moved() -> tuple[Learner, AnalyticPolicy]:
    """T4 in ten steps, with a policy that is not its reference."""
    learner, policy = make_learner(logistic(num_steps=10))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return learner, policy


def _ratio_by_densities(learner: Learner, policy: AnalyticPolicy, trajectory: Trajectory) -> torch.Tensor:
    """log policy / reference of a path, step by step from its latents."""
    total = torch.zeros(len(trajectory.clean_latents), dtype=torch.float64)
    for k in range(learner.kernel.num_steps):
        latents, reached = trajectory.latents[k], trajectory.latents[k + 1]
        with torch.no_grad():
            ours, theirs = (
                policy_step(policy, learner.kernel, k, latents, trajectory.inputs, reference=reference)
                for reference in (False, True)
            )
        total += (gaussian_log_prob(ours, reached) - gaussian_log_prob(theirs, reached)).double()
    return total


def test_the_log_ratio_is_that_of_the_paths_densities() -> None:
    """Of a policy that has moved; its mean is the KL."""
    learner, policy = _moved()
    batch = evaluation_batch(range(4000), learner.prompts, learner.controls, tuple(learner.config.controls))
    trajectory = learner.roll_out(batch, 0, 0, with_kl=True)
    expected = _ratio_by_densities(learner, policy, trajectory)
    assert trajectory.log_ratio is not None and trajectory.kl_per_step is not None
    assert trajectory.log_ratio.dtype == torch.float64 and float(expected.std()) > 0.1
    torch.testing.assert_close(trajectory.log_ratio, expected, atol=2e-4, rtol=1e-4)
    difference = trajectory.log_ratio - trajectory.kl_per_step.double().sum(1)
    assert abs(float(difference.mean())) < 4 * float(difference.std()) / 4000**0.5
    assert learner.roll_out(batch, 0, 0).log_ratio is None


def test_a_pre_trained_path_knows_the_policys_ratio_too() -> None:
    """The same paths as without it; the weights of the policy over the reference have mean 1; alone its own ratio is 0."""
    learner, policy = _moved()
    batch = evaluation_batch(range(4000), learner.prompts, learner.controls, tuple(learner.config.controls))
    inputs = Inputs(learner.encoder.encode(batch.prompts), batch.labels)
    kernel = learner.kernel

    def sampled(*, reference: bool, with_kl: bool = False, with_log_ratio: bool = False) -> Trajectory:
        noise = keyed_noise(0, 0, batch.sample_ids, policy.latent_shape, kernel.num_steps)
        return rollout(
            policy, kernel, inputs, noise, reference=reference, with_kl=with_kl, with_log_ratio=with_log_ratio
        )

    scored, plain = sampled(reference=True, with_log_ratio=True), sampled(reference=True, with_kl=True)
    assert torch.equal(scored.latents, plain.latents) and scored.kl_per_step is None
    assert scored.log_ratio is not None and plain.log_ratio is not None and plain.kl_per_step is not None
    expected = _ratio_by_densities(learner, policy, scored)
    torch.testing.assert_close(scored.log_ratio, expected, atol=2e-4, rtol=1e-4)
    weights = scored.log_ratio.exp()
    assert abs(float(weights.mean()) - 1) < 4 * float(weights.std()) / 4000**0.5 < 0.1
    assert float(scored.log_ratio.mean()) < -0.01  # −KL(reference ‖ policy)
    assert not plain.log_ratio.any() and not plain.kl_per_step.any()
    both = sampled(reference=True, with_kl=True, with_log_ratio=True)
    assert both.log_ratio is not None and torch.equal(both.log_ratio, scored.log_ratio)
    assert both.kl_per_step is not None and not both.kl_per_step.any()
    ours, again = sampled(reference=False, with_log_ratio=True), sampled(reference=False, with_kl=True)
    assert ours.log_ratio is not None and again.log_ratio is not None and torch.equal(ours.log_ratio, again.log_ratio)


@pytest.mark.full
def test_the_ratio_of_one_step_by_torchs_own_densities() -> None:
    """With a fixed and with a learned variance; on average the KL."""
    generator = torch.Generator().manual_seed(0)
    mean, other = torch.randn(2, 3, 2, generator=generator)
    std = torch.tensor(0.3)
    for learned in (std, 0.3 * torch.rand(3, 2, generator=generator).add(0.5)):
        ours, theirs = GaussianStep(mean, learned), GaussianStep(other, std)
        noise = torch.randn(20_000, 3, 2, generator=generator)
        reached = gaussian_sample(ours, noise[0])
        laws = [Independent(Normal(step.mean, step.std.expand_as(step.mean)), 1) for step in (ours, theirs)]
        expected = laws[0].log_prob(reached) - laws[1].log_prob(reached)
        torch.testing.assert_close(step_log_ratio(ours, theirs, noise[0]), expected.double(), atol=1e-4, rtol=1e-5)
        ratios = torch.stack([step_log_ratio(ours, theirs, z) for z in noise[:5000]])
        errors = ratios.std(0) / 5000**0.5
        assert bool(((ratios.mean(0) - step_kl(ours, theirs)).abs() < 4 * errors).all())
