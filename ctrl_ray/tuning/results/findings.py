"""What a sweep came to, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ctrl_ray.config import ControlConfig
from ctrl_ray.reporting.summary import Evaluation
from ctrl_ray.tuning.results.trials import SweepTrial


@dataclass(frozen=True, kw_only=True)
class SweepFindings:
    """What a sweep came to."""

    name: str
    trials: Sequence[SweepTrial]
    knobs: Sequence[str]
    """Paths that vary, in the order of the columns."""
    metric: str
    mode: str
    controls: Mapping[str, ControlConfig]
    before: Evaluation
    """The pre-trained model's."""
    best: SweepTrial | None = None
    shown: Mapping[str, tuple[SweepTrial, Evaluation]] = field(default_factory=dict)
    """Title (two short lines) to a trial and its evaluation, on the same prompts and noise as `before`."""
    dial_of: SweepTrial | None = None
    dial: Mapping[float, Mapping[str, float]] = field(default_factory=dict)
    """Adapter scale to {"accuracy", "kl"} of the adapter of `dial_of`."""
    adapter: str = ""
    """Where the best trial's adapter was exported to."""
    facts: Mapping[str, str] = field(default_factory=dict)
