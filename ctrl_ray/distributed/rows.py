"""What workers and driver tell each other about a run; imports neither torch nor Ray, so that any process reads it at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a run ends before `num_updates`."""

    kind: Literal["asked", "target_kl", "failed"]
    """'asked': by a signal; 'target_kl': by an evaluation whose KL is too large; 'failed': by one that cannot be made."""
    text: str
    """The same for people, such as 'SIGINT received'."""


@dataclass(frozen=True, slots=True)
class Started:
    """The workers are ready to train, also after a restart."""

    update: int
    """Updates that were done before: 0, or those of the checkpoint that the workers go on from."""
    kl_noise_floor: float | None = None
    """Nats (`ctrl_ray.evaluation.metric_names`); None: not measured."""
    rows: Sequence[MetricsRow] = ()
    """Those that the checkpoint brings: all of the run up to it. The driver may have ended before it had written the last."""


@dataclass(frozen=True, slots=True)
class UpdateDone:
    """The workers made an update."""

    update: int
    """Updates done."""
    metrics: Mapping[str, float]
    """By the names of `ctrl_ray.evaluation.metric_names`."""
    time: float | None = field(default=None, compare=False)
    """Seconds since 1970 when the channel got it."""


@dataclass(frozen=True, slots=True)
class EvaluationDone:
    """The policy was evaluated."""

    update: int
    """Updates that the evaluated policy has had."""
    metrics: Mapping[str, float]
    """By the names of `ctrl_ray.evaluation.metric_names`."""
    time: float | None = field(default=None, compare=False)
    """Seconds since 1970 when the channel got it."""


@dataclass(frozen=True, slots=True)
class SamplesDrawn:
    """Samples of an evaluation beside training."""

    update: int
    """Updates that the policy has had."""
    images: Sequence[np.ndarray]
    """uint8, (H, W, 3) each."""
    captions: Sequence[str]
    """One an image: what was asked for."""


@dataclass(frozen=True, slots=True)
class Notice:
    """A line for the person who waits."""

    text: str


@dataclass(frozen=True, slots=True)
class Stopping:
    """The driver got a signal and has asked the workers to stop."""

    signal: str
    """Its name, such as SIGINT."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """The workers return before `num_updates`; their last checkpoint is written."""

    update: int
    """Updates done."""
    stop: Stop


MetricsRow = UpdateDone | EvaluationDone
"""What becomes a row of metrics.jsonl."""
Row = Started | UpdateDone | EvaluationDone | SamplesDrawn | Notice | Stopping | Stopped
