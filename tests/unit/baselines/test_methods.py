"""From settings to samplers, and what is refused."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any, get_args

import pytest
import torch

from ctrl_ray.baselines.methods import SAMPLERS, make_sampler
from ctrl_ray.config import MethodConfig, SamplerConfig
from ctrl_ray.config.method import OPTIONS, MethodName
from ctrl_ray.errors import ConfigError
from ctrl_ray.exact.suite import logistic
from ctrl_ray.gradients.rollout import keyed_noise, rollout, rows_per_image
from ctrl_ray.policy.analytic import analytic_scheduler
from ctrl_ray.policy.schedule import load_kernel
from tests.unit.baselines.closed_forms import Bench

NAMES = [name for name in get_args(MethodName) if name != "plain"]


def test_every_method_has_a_sampler_with_its_options() -> None:
    assert set(SAMPLERS) == set(NAMES) == set(OPTIONS) - {"plain"}
    for name in NAMES:
        fields = {f.name for f in dataclasses.fields(SAMPLERS[name])}  # type: ignore[arg-type]
        assert set(OPTIONS[name]) <= fields, name
    assert make_sampler(MethodConfig(), (1.0,)) is rollout


def test_options_reach_the_sampler_which_travels() -> None:
    found = make_sampler(MethodConfig(name="tds", scale=0.5, num_particles=8), (4.0, 1.0))
    assert found == SAMPLERS["tds"](exponents=(4.0, 1.0), scale=0.5, num_particles=8)
    assert pickle.loads(pickle.dumps(found)) == found
    assert rows_per_image(found) == 8 and rows_per_image(rollout) == 1
    assert rows_per_image(make_sampler(MethodConfig(name="best_of_n", num_particles=16), (1.0,))) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "dps", "num_particles": 4}, "method dps has no option num_particles; its options are scale, window"),
        ({"scale": 2.0}, "method plain has no option scale; its options are none"),
        ({"name": "mpgd", "window": (0.7, 0.3)}, r"method.window is 0.7 0.3; expected two shares"),
        ({"name": "smc", "num_particles": 0}, "num_particles is 0; expected at least 1"),
    ],
)
def test_settings_that_say_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MethodConfig(**options)


def test_the_last_steps_are_left_alone_unless_told_otherwise() -> None:
    """A push there costs a large KL; with as many as there are steps nothing would be left."""
    sampler = SamplerConfig(num_steps=4, guidance_scale=2.0)
    assert MethodConfig(name="smc").sampler(sampler) == dataclasses.replace(sampler, reference_steps=1)
    assert MethodConfig(name="smc", reference_steps=0).sampler(sampler) == sampler
    with pytest.raises(ConfigError, match=r"num_steps is 4, but nothing steers the last 4 .* expected at least 5"):
        MethodConfig(name="smc", reference_steps=4).sampler(sampler)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_method_cannot_do_is_one_message(name: Any) -> None:
    bench = Bench.of(logistic(num_steps=4))
    folder = ("first=nowhere",) if name == "classifier_guidance" else None
    sampler: Any = make_sampler(MethodConfig(name=name, noised_classifier=folder), (1.0,))
    inputs, noise, rewards = bench.inputs(2), bench.noise(2), bench.learner.rewards
    with pytest.raises(ConfigError, match=f"method {name} samples the pre-trained model, but an adapter is given"):
        sampler(bench.policy, bench.learner.kernel, inputs, noise, rewards, reference=False)
    if name != "classifier_guidance":
        with pytest.raises(ConfigError, match=f"method {name} asks the classifiers on its way"):
            sampler(bench.policy, bench.learner.kernel, inputs, noise, reference=True)
    still = load_kernel(analytic_scheduler(), SamplerConfig(num_steps=4, eta=0.0))
    with pytest.raises(
        ConfigError,
        match=f"method {name} acts on steps that have noise and begin with more than noise, and none of the",
    ):
        sampler(bench.policy, still, inputs, noise, rewards, reference=True)
    without = _NoGradient(rewards)
    if name in ("dps", "mpgd", "tfg", "tds"):
        with pytest.raises(
            ConfigError, match=f"method {name} needs the gradient of the reward, but _NoGradient has none"
        ):
            sampler(bench.policy, bench.learner.kernel, inputs, noise, without, reference=True)
    elif name != "classifier_guidance":
        found = sampler(bench.policy, bench.learner.kernel, inputs, keyed_noise(0, 0, [0, 1], (1,), 4), without)
        assert torch.isfinite(found.clean_latents).all()


class _NoGradient:
    differentiable = False

    def __init__(self, rewards: Any) -> None:
        self.controls, self.class_log_probs = rewards.controls, rewards.class_log_probs
