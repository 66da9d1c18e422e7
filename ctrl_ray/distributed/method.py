"""What a training method is to the worker: one update at a time. CTRL's is `ctrl_ray.distributed.update`, that of the baseline
CFG fine-tuning `ctrl_ray.distributed.cfg_finetuning`."""

from __future__ import annotations

from typing import Protocol

from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.cfg_finetuning import CFGFineTuning
from ctrl_ray.distributed.learner import Learner
from ctrl_ray.distributed.update import CTRL
from ctrl_ray.offline.reading import OnBadRow


class Method(Protocol):
    """A way to train the policy.

    It owns one update: how often it rolls out, which loss it takes, how many optimizer steps it makes
    (`learner.engine.step`). All ranks must make the same collective calls, in the same order.
    """

    @property
    def needs_cotangent(self) -> bool:
        """Whether the reward must have a gradient."""
        ...

    def update(self, learner: Learner, update: int) -> dict[str, float]:
        """Train once (`update` counts from 0) and return the update's metrics, the same on every rank; their names are in
        `ctrl_ray.evaluation.metric_names`."""
        ...


def make_method(config: TrainConfig, on_bad_row: OnBadRow = "error") -> Method:
    """The method that a config asks for. on_bad_row: 'error', or 'skip' to set bad rows of the data set aside where it is
    read."""
    return CTRL.of(config) if config.draws_trajectories else CFGFineTuning(on_bad_row=on_bad_row)
