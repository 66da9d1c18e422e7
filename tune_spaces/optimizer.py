"""How fast the policy may learn: learning rate, rank of LoRA, and how long a drift one trajectory may ask for in the end.

Here a trial that lags is a bad one: ASHA looks at every evaluation and goes on with the better half.

All trials have one target here. METRIC = "gap", MODE = "min" asks instead which of them comes nearest to it, in nats.
"""

from __future__ import annotations

from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

PRESET = "shapes"
METRIC = "accuracy"
MODE = "max"
NUM_UPDATES, EVERY = 160, 20


def space() -> dict[str, Any]:
    """Dotted config path to distribution, or to one value for all trials."""
    return {
        "optimizer.learning_rate": tune.loguniform(1e-3, 3e-2),
        "estimator.final_max_drift": tune.loguniform(2.0, 60.0),
        "lora.rank": tune.choice([2, 4, 8, 16]),
        "num_updates": NUM_UPDATES,
        "evaluation.every_updates": EVERY,
        "checkpoint_every_updates": EVERY,
    }


def scheduler() -> ASHAScheduler:
    """Stops trials that are in the worse half after 20, 40 or 80 updates."""
    return ASHAScheduler(time_attr="updates_done", grace_period=EVERY, max_t=NUM_UPDATES + 1, reduction_factor=2)
