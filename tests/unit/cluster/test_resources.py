"""What a run needs and what the cluster has."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayActorError

from ctrl_ray.cluster import resources
from ctrl_ray.cluster.resources import check_resources
from ctrl_ray.config import ControlConfig, RewardPoolConfig, ScalingConfig, TrainConfig
from ctrl_ray.errors import ResourceError

CONFIG = TrainConfig(controls={"size": ControlConfig(classes=("a", "b"), oracle="jpeg_size")})


def test_resource_error_says_both_numbers() -> None:
    """Needed and available, with the sum spelled out."""
    config = dataclasses.replace(
        CONFIG,
        scaling=ScalingConfig(num_workers=2, cpus_per_worker=4),
        rewards=RewardPoolConfig(num_actors=2, cpus_per_actor=1.5),
    )
    check_resources(config, {"CPU": 11.0}, "the cluster")
    with pytest.raises(ResourceError, match=r"needs 11 CPUs \(2 workers × 4 \+ 2 reward actors × 1\.5\).*has 8"):
        check_resources(config, {"CPU": 8.0}, "the cluster")
    gpu = dataclasses.replace(config, scaling=ScalingConfig(num_workers=2, use_gpu=True))
    with pytest.raises(ResourceError, match=r"needs 2 GPUs.*has 1"):
        check_resources(gpu, {"CPU": 64.0, "GPU": 1.0}, "the cluster")


def test_workers_on_shares_still_have_a_card_each() -> None:
    """Two workers of 0.6 and an actor of 0.4 add up to 1.6 cards, and need two."""
    config = dataclasses.replace(
        CONFIG,
        scaling=ScalingConfig(num_workers=2, use_gpu=True, gpus_per_worker=0.6),
        rewards=RewardPoolConfig(gpus_per_actor=0.4),
    )
    check_resources(config, {"CPU": 8.0, "GPU": 2.0}, "the cluster")
    with pytest.raises(
        ResourceError, match=r"needs 2 GPUs \(2 workers × 0\.6, a card for each \+ 1 reward actor × 0\.4\)"
    ):
        check_resources(config, {"CPU": 8.0, "GPU": 1.7}, "the cluster")


class _Nodes:
    """Ray with nodes that answer, stay silent or are lost; `waits` are the calls of ray.wait."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers, self.waits, self.cancelled = answers, 0, list[str]()

    def remote(self, function: Any) -> Any:
        return SimpleNamespace(
            options=lambda **options: SimpleNamespace(remote=lambda: options["scheduling_strategy"].node_id)
        )

    def wait(self, references: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        self.waits += 1
        assert num_returns == len(references)
        done = [reference for reference in references if self.answers[reference] != "silent"]
        return done, [reference for reference in references if reference not in done]

    def get(self, reference: str) -> Any:
        if isinstance(self.answers[reference], Exception):
            raise self.answers[reference]
        return self.answers[reference]

    def cancel(self, reference: str, force: bool) -> None:
        self.cancelled.append(reference)


def test_cards_are_asked_all_at_once_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """One wait for all nodes; only those that have not answered are asked again."""
    monkeypatch.setattr(resources, "_known_gpu_memory", {})
    a, b, c, d = ("a" * 56, "b" * 56, "c" * 56, "d" * 56)
    nodes = _Nodes({a: 80, b: "silent", c: None, d: RayActorError()})
    monkeypatch.setattr(resources, "ray", nodes)
    assert resources._gpu_memory([a, b, c, d]) == {a: 80}
    assert (nodes.waits, nodes.cancelled) == (1, [b])
    nodes.answers |= {a: 1, b: 24}
    assert resources._gpu_memory([a, b]) == {a: 80, b: 24}
    assert resources._gpu_memory([a, b]) == {a: 80, b: 24} and nodes.waits == 2
