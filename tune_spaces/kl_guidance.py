"""Where accuracy is bought most cheaply: the pull of the control against the price of leaving the pre-trained model.

Both are drawn log-uniformly, so that their exponent (at the optimum all that counts) goes from 0.3 to 10. The first eight
trials span it, with three pairs of equal exponent. No scheduler: a weak pull is not a bad trial, it is a point of the map.
"""

from __future__ import annotations

from typing import Any

from ray import tune

PRESET = "shapes"
METRIC = "accuracy"
MODE = "max"

KL_COEF, STRENGTH = "kl_coef", "controls.jpeg_size.guidance_strength"
PAIRS = [(2.0, 0.6), (0.5, 5.0), (0.6, 0.6), (2.0, 2.0), (0.5, 1.5), (1.6, 4.8), (0.5, 3.0), (0.8, 4.8)]
"""(kl_coef, guidance_strength): exponents 0.3, 10, and twice each of 1, 3 and 6."""


def space() -> dict[str, Any]:
    """Dotted config path to distribution, or to one value for all trials: half of the preset's updates, about four
    minutes a trial on two cores."""
    return {
        KL_COEF: tune.loguniform(0.5, 2.0),
        STRENGTH: tune.loguniform(0.6, 5.0),
        "num_updates": 100,
        "checkpoint_every_updates": 25,
        "evaluation.every_updates": 50,
        "evaluation.num_samples": 64,
        "evaluation.final_num_samples": 256,
        "evaluation.max_log_z_samples": 1024,  # of all classes at large exponents, thousands would be drawn for each trial
        "evaluation.num_pairs": 0,
    }


def points() -> list[dict[str, Any]]:
    """Trials to run first."""
    return [{KL_COEF: kl_coef, STRENGTH: strength} for kl_coef, strength in PAIRS]
