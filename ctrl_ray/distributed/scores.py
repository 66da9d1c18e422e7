"""By what a checkpoint is chosen, and when an evaluation ends the run; light, for Ray Train's controller reads it too."""

from __future__ import annotations

from collections.abc import Mapping

from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.rows import Stop

UNSCORED = -1e6
"""Score of a checkpoint without an evaluation, and of the pre-trained model: worse than any objective."""
OVER_TARGET_KL = -1e9
"""Score of a checkpoint whose KL exceeds target_kl: worse than one without an evaluation."""

_TOLD = ("accuracy", "kl", "gap", "gap_standard_error")


def told_with_checkpoint(metrics: Mapping[str, float]) -> dict[str, float]:
    """What a checkpoint's report says of its evaluation beside the score, each control's accuracy too: a sweep's schedulers and
    its table read it."""
    return {name: value for name, value in metrics.items() if name in _TOLD or name.startswith("accuracy/")}


def exceeds_target_kl(config: TrainConfig, metrics: Mapping[str, float]) -> Stop | None:
    """The stop that an evaluation with these metrics asks for; None where its KL is within target_kl."""
    if config.target_kl is None or metrics["kl"] <= config.target_kl:
        return None
    return Stop("target_kl", f"KL {metrics['kl']:.2f} nats exceeds target_kl {config.target_kl:g}")


def evaluation_score(metrics: Mapping[str, float], config: TrainConfig) -> float:
    """What 'best' means: the objective Σ_c γ_c E[log p̂_c] − kl_coef KL in nats; OVER_TARGET_KL above target_kl."""
    if exceeds_target_kl(config, metrics) is not None:
        return OVER_TARGET_KL
    rewards = (control.guidance_strength * metrics[f"log_prob/{name}"] for name, control in config.controls.items())
    return sum(rewards) - config.kl_coef * metrics["kl"]
