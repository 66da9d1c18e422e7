"""What an image costs: exact numbers on samplers whose work is known, and pairs of timings by a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ctrl_ray.baselines.methods import make_sampler
from ctrl_ray.comparison.cost import FEWEST_PAIRS, MOST_PAIRS, Calls, CountedPolicy, CountedRewards, timed_pairs
from ctrl_ray.config.method import MethodConfig
from ctrl_ray.diffusion.steps import Guidance
from ctrl_ray.exact.suite import gaussian
from ctrl_ray.gradients.rollout import keyed_noise
from ctrl_ray.policy.protocol import Condition, Inputs
from tests.analytic import make_learner

IMAGES = 3
STEPS = gaussian().problem.sampler.num_steps


def counted(**options: Any) -> dict[str, float]:
    """Per image, of one method on the Gaussian problem."""
    learner, policy = make_learner(gaussian())
    calls = Calls()
    inputs = Inputs(learner.encoder.encode(learner.prompts * IMAGES), torch.zeros(IMAGES, 1, dtype=torch.long))
    make_sampler(MethodConfig(**options), (1.0,))(
        CountedPolicy(policy, calls),
        learner.kernel,
        inputs,
        keyed_noise(0, 0, range(IMAGES), (1,), STEPS),
        CountedRewards(learner.rewards, calls),
        reference=True,
    )
    return calls.per_image(IMAGES)


def guided_steps() -> int:
    learner, _ = make_learner(gaussian())
    return sum(learner.kernel.std(k) > 0 and learner.kernel.controlled(k) for k in range(STEPS))


def test_plain_sampling_is_one_forward_a_step() -> None:
    assert counted() == {"calls": STEPS, "forwards": STEPS, "backwards": 0, "decodes": 0, "decode_backwards": 0}


def test_reconstruction_guidance_goes_back_through_every_guided_step() -> None:
    """A forward a step; of the guided ones a backward, and a decode with its gradient."""
    guided = guided_steps()
    assert 0 < guided <= STEPS
    assert counted(name="dps") == {
        "calls": STEPS,
        "forwards": STEPS,
        "backwards": guided,
        "decodes": guided,
        "decode_backwards": guided,
    }


def test_mpgd_goes_back_through_the_decoder_alone() -> None:
    found = counted(name="mpgd")
    assert (found["backwards"], found["decode_backwards"]) == (0, guided_steps())


def test_a_guided_window_costs_what_it_holds() -> None:
    whole, half = (counted(name="dps", window=window) for window in ((0.0, 1.0), (0.0, 0.5)))
    assert half["backwards"] == STEPS // 2 < whole["backwards"]
    assert half["forwards"] == whole["forwards"]


def test_tfg_decodes_k_times_as_often_as_it_iterates() -> None:
    found = counted(name="tfg", num_smoothed=3, num_iterations=2)
    assert found["decode_backwards"] == 3 * 2 * guided_steps()
    assert found["backwards"] == guided_steps()


def test_best_of_n_is_n_samples_each_judged_once() -> None:
    found = counted(name="best_of_n", num_particles=5)
    assert (found["forwards"], found["decodes"], found["decode_backwards"]) == (5 * STEPS, 5, 0)


def test_a_filter_runs_every_particle_and_asks_about_each_at_every_step_and_at_the_end() -> None:
    found = counted(name="smc", num_particles=4)
    assert (found["forwards"], found["decodes"], found["decode_backwards"]) == (4 * STEPS, 4 * (STEPS + 1), 0)
    twisted = counted(name="tds", num_particles=4)
    assert (twisted["backwards"], twisted["decode_backwards"]) == (4 * guided_steps(), 4 * guided_steps())


def test_every_branch_of_guidance_is_a_row() -> None:
    """Three with a scale for the label beside that of the prompt."""

    class Denoiser:
        latent_shape = (1,)

        def __call__(self, latents: torch.Tensor, *_: Any, **__: Any) -> Any:
            class Output:
                prediction = latents

            return Output

    calls = Calls()
    inputs = Inputs(
        Condition(("a", "b"), {}),
        torch.zeros(2, 1, dtype=torch.long),
        Guidance(scale=7.5, control_scale=2.0),
    )
    counting = CountedPolicy(Denoiser(), calls)
    counting(torch.zeros(2, 1), torch.tensor(0), inputs, reference=False)
    assert (calls.calls, calls.forwards, calls.backwards) == (1, 6, 0)
    assert counting.latent_shape == (1,)


def test_images_are_not_decoded_again_to_be_judged() -> None:
    class Model:
        def class_log_probs(self, inputs: torch.Tensor, prompts: Any) -> str:
            return "asked"

        def decode(self, latents: torch.Tensor) -> str:
            return "decoded"

    calls = Calls()
    rewards = CountedRewards(Model(), calls)
    assert rewards.class_log_probs(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), [""] * 4) == "asked"
    assert calls.decodes == 0
    assert rewards.class_log_probs(torch.zeros(4, 4, 8, 8), [""] * 4) == "asked"
    assert rewards.decode(torch.zeros(2, 4, 8, 8)) == "decoded"
    assert (calls.decodes, calls.decode_backwards) == (6, 0)


class Clock:
    """Advanced by whatever runs."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> Any:
        """A run that takes so long, each call the next of these, then the last."""
        left = list(seconds)

        def run() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_seconds_are_medians_of_pairs_after_one_run_that_does_not_count() -> None:
    """A warm-up that is slow plays no part; long runs are timed in as few pairs as there may be."""
    clock = Clock()
    cost = timed_pairs(
        clock.takes(20.0, 8.0, 10.0, 24.0),
        clock.takes(50.0, 2.0, 2.0, 4.0),
        2,
        Calls(),
        long_enough_s=20.0,
        clock=clock,
    )
    assert cost.num_pairs == FEWEST_PAIRS
    assert (cost.seconds, cost.plain_seconds) == (5.0, 1.0)
    assert cost.ratio == 5.0 and cost.ratio_range == (4.0, 6.0)


def test_a_run_of_minutes_is_timed_once() -> None:
    """Its first run counts: what warms up is nothing beside it."""
    clock = Clock()
    cost = timed_pairs(clock.takes(200.0, 1.0), clock.takes(5.0, 2.0), 2, Calls(), long_enough_s=20.0, clock=clock)
    assert (cost.num_pairs, cost.ratio, cost.seconds) == (1, 100.0, 100.0)


def test_short_runs_are_timed_more_often() -> None:
    clock = Clock()
    cost = timed_pairs(clock.takes(0.02), clock.takes(0.01), 1, Calls(), long_enough_s=20.0, clock=clock)
    assert cost.num_pairs == MOST_PAIRS
    assert cost.ratio == pytest.approx(2.0)


def test_no_pair_is_begun_after_so_many_seconds() -> None:
    clock = Clock()
    cost = timed_pairs(clock.takes(0.9), clock.takes(0.1), 1, Calls(), long_enough_s=5.0, clock=clock)
    assert cost.num_pairs == 5


def test_what_is_counted_is_one_run_of_the_method() -> None:
    """However often it is timed."""
    calls, clock = Calls(), Clock()

    def method() -> None:
        calls.forwards += 20
        clock.now += 1.0

    cost = timed_pairs(method, clock.takes(1.0), 4, calls, long_enough_s=20.0, clock=clock)
    assert cost.calls["forwards"] == 5.0
