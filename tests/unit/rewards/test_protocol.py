"""Which estimators a reward can serve."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ctrl_ray.config import EstimatorConfig
from ctrl_ray.errors import ConfigError
from ctrl_ray.gradients.estimators import make_estimator
from ctrl_ray.rewards.protocol import require_gradient


@pytest.mark.parametrize("name", ["full", "sticking_the_landing", "last_k", "random_suffix", "adjoint_matching"])
def test_a_reward_without_gradient_is_refused_by_name_with_a_way_out(name: Any) -> None:
    estimator = make_estimator(EstimatorConfig(name=name), num_steps=10)
    black_box: Any = SimpleNamespace(differentiable=False)
    with pytest.raises(ConfigError, match=rf"estimator.name is '{name}'.*--estimator.name reinforce"):
        require_gradient(black_box, estimator.name, estimator.needs_cotangent)
    differentiable: Any = SimpleNamespace(differentiable=True)
    require_gradient(differentiable, estimator.name, estimator.needs_cotangent)


def test_reinforce_takes_any_reward() -> None:
    estimator = make_estimator(EstimatorConfig(name="reinforce"), num_steps=10)
    for differentiable in (True, False):
        rewards: Any = SimpleNamespace(differentiable=differentiable)
        require_gradient(rewards, estimator.name, estimator.needs_cotangent)
