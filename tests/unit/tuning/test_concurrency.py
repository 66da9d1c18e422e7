"""Room for trials."""

from __future__ import annotations

import pytest

from ctrl_ray.config import ScalingConfig, TrainConfig
from ctrl_ray.tuning.concurrency import concurrent_trials, trial_bundles


@pytest.mark.parametrize(
    ("free", "bundles", "expected"),
    [
        ([{"CPU": 1.0}], [{"CPU": 1.0}], 1),
        ([{"CPU": 7.0}], [{"CPU": 2.0}] * 2, 1),  # 4 of 7; the 3 that are left hold one worker of two
        ([{"CPU": 3.0}, {"CPU": 3.0}], [{"CPU": 2.0}] * 2, 1),  # 6 CPUs, but each node holds one worker only
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 64.0}], [{"CPU": 2.0, "GPU": 1.0}] * 2, 2),
        ([{"CPU": 0.5}], [{"CPU": 1.0}], 0),
        ([{"CPU": 0.3}], [{"CPU": 0.1}], 3),  # not 2 by rounding
    ],
)
def test_trials_that_have_room(free: list, bundles: list, expected: int) -> None:
    assert concurrent_trials(free, bundles) == expected
    assert sum(node["CPU"] for node in free) > 0  # what is given is not used up


def test_an_elastic_trial_needs_its_fewest_workers() -> None:
    scaling = ScalingConfig(num_workers=4, min_workers=2, cpus_per_worker=1.5)
    config = TrainConfig(scaling=scaling, micro_batch_size_per_worker=16)
    assert trial_bundles(config) == [{"CPU": 1.5}] * 2
