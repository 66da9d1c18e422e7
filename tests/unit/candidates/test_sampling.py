"""Groups of candidates on problems in closed form: who is drawn by whom, who is kept, and the law of what is kept."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from torch import Tensor

from ctrl_ray.candidates.sampling import CandidatePlan, ChosenPaths, Chunk, check_density, sample_candidates
from ctrl_ray.candidates.weights import selection_noise
from ctrl_ray.config import SamplerConfig
from ctrl_ray.diffusion.noise import draw_key, draw_noise
from ctrl_ray.distributed.learner import Learner
from ctrl_ray.errors import ConfigError
from ctrl_ray.exact.chain import reference_chain
from ctrl_ray.exact.grid import solve_on_grid
from ctrl_ray.exact.suite import logistic
from ctrl_ray.gradients.rollout import rollout
from ctrl_ray.policy.analytic import AnalyticPolicy, analytic_scheduler
from ctrl_ray.policy.protocol import Inputs
from ctrl_ray.policy.schedule import load_kernel
from tests.analytic import make_learner
from tests.unit.candidates.resampling import Kind, law_of_the_chosen

PUSH = 0.15
"""Of the policy, at every step: in the reward's direction, and far from optimal."""


def _pushing(num_steps: int) -> tuple[Learner, AnalyticPolicy]:
    learner, policy = make_learner(logistic(num_steps=num_steps))
    with torch.no_grad():
        for parameter in policy.trainable_parameters().values():
            parameter.fill_(PUSH)
    return learner, policy


def _sample(
    learner: Learner, policy: AnalyticPolicy, plan: CandidatePlan, seeds: list[int], initial_noise: Tensor | None = None
) -> ChosenPaths:
    exponents = {name: control.guidance_strength for name, control in learner.config.controls.items()}
    inputs = _inputs(learner, len(seeds))
    return sample_candidates(
        policy, learner.kernel, inputs, learner.rewards, exponents, seeds, (1,), plan, initial_noise=initial_noise
    )


def _inputs(learner: Learner, count: int) -> Inputs:
    return Inputs(learner.encoder.encode(learner.prompts * count), torch.zeros(count, 1, dtype=torch.long))


def test_every_candidate_is_drawn_once() -> None:
    assert CandidatePlan(2, 3, 0.25, 3).chunks() == [
        Chunk(True, (0, 1), (0, 0)),
        Chunk(False, (0, 1, 0), (1, 1, 2)),
        Chunk(False, (1,), (2,)),
    ]
    alone = CandidatePlan(1, 5, None, 4).chunks()
    assert alone == [Chunk(True, (0,) * 4, (0, 1, 2, 3)), Chunk(True, (0,), (4,))]
    with pytest.raises(ConfigError, match="num_candidates is 0; expected at least 1"):
        CandidatePlan(1, 0, None, 4)


def test_the_kept_path_is_the_one_that_the_weights_choose() -> None:
    """Each candidate by itself, with its own key; its weight from the noise; the largest weight with its Gumbel number."""
    learner, policy = _pushing(5)
    plan, seeds = CandidatePlan(2, 4, 0.25, 100), [77, 5]
    found = _sample(learner, policy, plan, seeds)
    for image, seed in enumerate(seeds):
        paths, log_weights = [], []
        for candidate in range(4):
            assert draw_key(seed, 0, candidate, "candidate") != draw_key(seed, 0, candidate + 1, "candidate")
            z = draw_noise(seed, 0, [candidate], "candidate", (6, 1))
            reference = candidate == 0
            path = rollout(
                policy, learner.kernel, _inputs(learner, 1), lambda k, z=z: z[:, k], reference=reference
            ).latents[:, 0]
            total = float(z[0, 1:].sum())
            ratio = PUSH * total + (-1 if reference else 1) * 5 * PUSH**2 / 2
            weight = expit(float(path[-1])) / (0.25 + 0.75 * math.exp(ratio))
            paths.append(path)
            log_weights.append(math.log(weight))
        winner = int(np.argmax([w + selection_noise(seed, j) for j, w in enumerate(log_weights)]))
        torch.testing.assert_close(found.trajectory.latents[:, image], paths[winner])
        weights = np.exp(log_weights)
        assert float(found.ess[image]) == pytest.approx(weights.sum() ** 2 / (weights**2).sum(), rel=1e-4)


def test_an_image_depends_neither_on_the_chunks_nor_on_the_others() -> None:
    learner, policy = _pushing(5)
    seeds = list(range(20, 26))
    whole = _sample(learner, policy, CandidatePlan(6, 4, 0.25, 24), seeds)
    ones = _sample(learner, policy, CandidatePlan(6, 4, 0.25, 5), seeds)
    fewer = _sample(learner, policy, CandidatePlan(2, 4, 0.25, 24), seeds[4:])
    torch.testing.assert_close(ones.trajectory.latents, whole.trajectory.latents)
    torch.testing.assert_close(ones.ess, whole.ess)
    torch.testing.assert_close(fewer.trajectory.latents, whole.trajectory.latents[:, 4:])
    start = torch.arange(6.0)[:, None] - 3
    given = _sample(learner, policy, CandidatePlan(6, 4, 0.25, 5), seeds, initial_noise=start)
    assert torch.equal(given.trajectory.latents[0], start)
    assert not torch.equal(given.trajectory.clean_latents, whole.trajectory.clean_latents)


def test_a_policy_needs_noise_at_its_steps() -> None:
    kernel = load_kernel(analytic_scheduler(), SamplerConfig(num_steps=4, eta=0.0))
    check_density(kernel, CandidatePlan(1, 8, None, 8))
    with pytest.raises(ConfigError, match=r"num_candidates is 8, but denoising step 0 has no noise \(eta 0\)"):
        check_density(kernel, CandidatePlan(1, 8, 0.25, 8))


@pytest.mark.full
@pytest.mark.parametrize("share", [None, 0.25])
def test_the_law_on_t4_tends_to_the_tilt(share: float | None) -> None:
    """50 steps, of the pre-trained model alone and with a poor policy; the integral is over paths drawn elsewhere."""
    learner, policy = _pushing(50)
    problem = logistic().problem
    solution = solve_on_grid(problem, num_bins=600)
    edges = np.array([-2.5, -2, -1.5, -0.5, 0.5, 1.5, 2, 2.5])
    tilt = np.bincount(np.digitize(solution.grid.centres, edges), solution.tilt.law, minlength=9)
    rng, paths = np.random.default_rng(1), 100_000
    drawn = []
    for push in (0.0, PUSH):
        x, ratio = rng.standard_normal(paths), np.zeros(paths)
        for step in reference_chain(problem.mixture, problem.sampler):
            z = rng.standard_normal(paths)
            ratio += PUSH * z + (PUSH**2 / 2 if push else -(PUSH**2) / 2)
            x = step.mean(x) + step.std * (push + z)
        drawn.append((x, ratio))
    equal, distances = np.full(paths, 1 / paths), []
    for count, images in ((1, 0), (4, 3000), (16, 2000), (64, 800)):
        if share is None:
            x, base = solution.grid.centres, solution.base.law
            kinds = [Kind(count, base, expit(x), np.digitize(x, edges))]
        else:
            first = max(1, round(share * count))
            a = first / count
            kinds = [
                Kind(number, equal, expit(x) / (a + (1 - a) * np.exp(ratio)), np.digitize(x, edges))
                for number, (x, ratio) in zip((first, count - first), drawn, strict=True)
                if number
            ]
        law = law_of_the_chosen(kinds, 9)
        distances.append(0.5 * float(np.abs(law - tilt).sum()))
        if not images:
            continue
        found = _sample(learner, policy, CandidatePlan(images, count, share, 40_000), list(range(images)))
        x = found.trajectory.clean_latents[:, 0].numpy()
        reached = np.bincount(np.digitize(x, edges), minlength=9) / images
        print(
            f"K {count}: TV {0.5 * np.abs(reached - tilt).sum():.4f}, predicted {distances[-1]:.4f}, ESS {found.ess.mean():.2f}"
        )
        assert np.all(np.abs(reached - law) < 4.5 * np.sqrt(law * (1 - law) / images) + 2e-3)
    assert distances == sorted(distances, reverse=True) and distances[0] > 0.2
    assert distances[1] < 0.12 and distances[2] < 0.03 and distances[3] < 0.012
