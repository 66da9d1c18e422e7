"""How many trials have room at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ctrl_ray.config import TrainConfig


def trial_bundles(config: TrainConfig) -> list[dict[str, float]]:
    """What the workers of one trial reserve, all at once or not at all (the fewest of an elastic group)."""
    scaling = config.scaling
    return [scaling.worker_resources] * (scaling.min_workers or scaling.fixed_num_workers)


def concurrent_trials(free: Sequence[Mapping[str, float]], bundles: Sequence[Mapping[str, float]]) -> int:
    """Trials whose workers all have room on nodes with these free resources; 0 when not even one has.

    Trials are placed one after the other, each worker on the first node with room. A trial's own process and the sweep's
    driver reserve nothing, so that trials never hold what others wait for: no number of them can deadlock, but more than
    this one would only wait.
    """
    left = [dict(node) for node in free]
    count = 0
    while _placed(left, bundles):
        count += 1
    return count


def _placed(left: list[dict[str, float]], bundles: Sequence[Mapping[str, float]]) -> bool:
    """Take the bundles out of `left`, or leave it as it is when they do not all fit."""
    assert bundles and any(amount > 0 for amount in bundles[0].values())
    trial = [dict(node) for node in left]
    for bundle in bundles:
        for node in trial:
            if all(node.get(kind, 0.0) + 1e-9 >= amount for kind, amount in bundle.items()):
                for kind, amount in bundle.items():
                    node[kind] -= amount
                break
        else:
            return False
    left[:] = trial
    return True
