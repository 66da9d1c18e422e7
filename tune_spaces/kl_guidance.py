"""Where accuracy is bought most cheaply: the pull of the control and the price of leaving the pre-trained model.

At the optimum only guidance_strength / kl_coef counts; in a run of finite length both also set the size of the gradient.
"""

from __future__ import annotations

from typing import Any

from ray import tune

PRESET = "shapes"
METRIC = "accuracy"
MODE = "max"


def space() -> dict[str, Any]:
    """Dotted config path to distribution. Trials end at 6 nats, else the strongest pull would always win."""
    return {
        "kl_coef": tune.loguniform(0.25, 4.0),
        "controls.jpeg_size.guidance_strength": tune.loguniform(0.5, 8.0),
        "optimizer.learning_rate": tune.loguniform(3e-4, 3e-3),
        "target_kl": 6.0,
    }
