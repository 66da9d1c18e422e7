"""From Ray Train's reports to Ray Tune's; light, for the callback lives in Ray Train's controller, which starts sooner without
torch and diffusers."""

from __future__ import annotations

import time
from typing import Any

from ray.train import Checkpoint
from ray.tune.integration.ray_train import TuneReportCallback

from ctrl_ray.distributed.scores import UNSCORED

_TAKEN_EVERY_S = 0.05


class EvaluationsToTune(TuneReportCallback):
    """Ray's callback for checkpoints with an evaluation of their own; the last one's figures come from the final
    evaluation."""

    def __init__(self, num_updates: int) -> None:
        super().__init__()
        self._num_updates = num_updates

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        if metrics[0]["score"] != UNSCORED and metrics[0]["updates_done"] < self._num_updates:
            super().after_report(run_context, metrics, checkpoint)

    def wait_until_taken(self) -> None:
        """Until Tune has taken every report: what the trial returns does not go through the same queue, and would
        overtake them."""
        while not self._training_actor_item_queue.empty():
            time.sleep(_TAKEN_EVERY_S)
