"""By what a checkpoint is chosen."""

from __future__ import annotations

import dataclasses

import pytest

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.distributed.rows import Stop
from ctrl_ray.distributed.scores import UNSCORED, evaluation_score, exceeds_target_kl, told_with_checkpoint

CONFIG = TrainConfig(controls={"size": ControlConfig(classes=("a", "b"), oracle="jpeg_size")})


def test_score_is_the_objective_and_refuses_too_much_kl() -> None:
    """What 'best checkpoint' means: γ log p − kl_coef KL, by hand."""
    strong = dataclasses.replace(CONFIG.controls["size"], guidance_strength=4.0)
    config = dataclasses.replace(CONFIG, controls={"size": strong}, kl_coef=0.5)
    assert evaluation_score({"log_prob/size": -0.5, "kl": 3.0}, config) == pytest.approx(4 * -0.5 - 0.5 * 3.0)
    limited = dataclasses.replace(config, target_kl=2.0)
    over, under = {"log_prob/size": -0.1, "kl": 3.0}, {"log_prob/size": -9.0, "kl": 1.0}
    assert evaluation_score(over, limited) < UNSCORED < evaluation_score(under, limited)
    assert exceeds_target_kl(limited, over) == Stop("target_kl", "KL 3.00 nats exceeds target_kl 2")
    assert exceeds_target_kl(limited, under) is None and exceeds_target_kl(config, over) is None


def test_a_sweep_is_told_each_controls_accuracy() -> None:
    told = {"accuracy": 0.7, "accuracy/size": 0.9, "accuracy/colour": 0.5, "kl": 2.0, "gap": 3.0}
    assert told_with_checkpoint({**told, "accuracy_error": 0.1, "macro_f1/size": 0.8, "log_prob/size": -1.0}) == told
