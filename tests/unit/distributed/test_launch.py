"""What Ray Train is asked for."""

from __future__ import annotations

import dataclasses

import pytest

from ctrl_ray.cluster.resources import check_resources
from ctrl_ray.config import ControlConfig, RewardPoolConfig, ScalingConfig, TrainConfig
from ctrl_ray.distributed.launch import _Follower, ascii_name, num_workers
from ctrl_ray.distributed.rows import Row, Stop, Stopped, Stopping, UpdateDone
from ctrl_ray.errors import ConfigError, ResourceError

CONFIG = TrainConfig(controls={"size": ControlConfig(classes=("a", "b"), oracle="jpeg_size")})


def test_an_elastic_group_is_a_range() -> None:
    """Ray Train's tuple; the fewest workers must fit the cluster, the most need not."""
    assert num_workers(ScalingConfig(num_workers=3)) == 3
    assert num_workers(ScalingConfig(num_workers=3, min_workers=3)) == 3
    assert num_workers(ScalingConfig(num_workers=3, min_workers=1)) == (1, 3)
    for wrong in (0, 4):
        with pytest.raises(ConfigError, match=rf"min_workers is {wrong}; expected 1 to scaling.num_workers \(3\)"):
            ScalingConfig(num_workers=3, min_workers=wrong)
    config = dataclasses.replace(
        CONFIG,
        scaling=ScalingConfig(num_workers=8, min_workers=2),
        global_batch_size=64,
        micro_batch_size_per_worker=8,
        rewards=RewardPoolConfig(num_actors=1),
    )
    check_resources(config, {"CPU": 3.0}, "the cluster")
    with pytest.raises(ResourceError, match="needs 3 CPUs"):
        check_resources(config, {"CPU": 2.0}, "the cluster")


def test_a_runs_name_for_ray_is_ascii_and_always_the_same() -> None:
    """By it a run is resumed; two names that differ in other letters are two runs, and a plain one stays as it is."""
    assert ascii_name("my run #1 [50%25] & b") == "my run #1 [50%25] & b"
    assert ascii_name("größe").startswith("gr__e-") and ascii_name("größe").isascii()
    assert ascii_name("größe") == ascii_name("größe") != ascii_name("grüße")
    assert len(ascii_name("好" * 85)) <= 255


def test_a_run_that_was_asked_to_stop_is_stopped_even_where_its_last_update_was_done() -> None:
    """No worker says so then; a comparison or a script that trains would go on with what comes next."""
    kl = Stopped(4, Stop("target_kl", "KL 9"))
    shown: list[Row] = []
    cases = (([Stopping("SIGTERM")], "asked"), ([kl], "target_kl"), ([Stopping("SIGINT"), kl], "asked"), ([], None))
    for rows, kind in cases:
        follower = _Follower(shown.append)
        for row in (UpdateDone(4, {}), *rows):
            follower(row)
        assert (follower.stopped and follower.stopped.kind) == kind and follower.updates_done == 4
    assert len(shown) == 8
