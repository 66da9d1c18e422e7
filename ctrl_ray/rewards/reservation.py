"""Telling Ray Train how much of the cluster the reward pool takes.

An elastic worker group counts the workers that it has room for from what the nodes have in all, less what Ray's
autoscaling coordinator has noted for others; actors are not noted by themselves. Without this note a group that lost a
node asks for more workers than fit beside the pool, waits until Ray Train's start timeout, and asks again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from ctrl_ray.ray_internals import autoscaling_coordinator, note_taken

logger = logging.getLogger(__name__)

_RENEW_S = 20.0
_EXPIRES_S = 180.0
"""As Ray Train does with its own: what a killed pool leaves is forgotten."""


class Reservation:
    """A pool's entry with the coordinator, kept up by calling `hold` often; it asks Ray's autoscaler for room as well."""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        """name: of the entry, unique in the cluster; options: what Ray is asked for each actor."""
        self._name = name
        amounts = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus"), **(options.get("resources") or {})}
        self._bundle = {kind: float(amount) for kind, amount in amounts.items() if amount}
        self._spread = options.get("scheduling_strategy") == "SPREAD"
        self._coordinator: Any = None
        self._held, self._renew_at_s = 0, 0.0

    def hold(self, num_actors: int) -> None:
        """Note this many actors; returns at once, and does nothing while the note stands."""
        now_s = time.monotonic()
        if not self._bundle or (num_actors == self._held and now_s < self._renew_at_s):
            return
        self._held, self._renew_at_s = num_actors, now_s + _RENEW_S
        try:
            self._note(num_actors)
        except Exception as error:  # Ray has no public interface for it; a pool must not end for its sake
            logger.warning("Ray Train was not told what the reward pool takes (%s: %s)", type(error).__name__, error)

    def _note(self, num_actors: int) -> None:
        if self._coordinator is None:
            self._coordinator = autoscaling_coordinator()
        bundles = [self._bundle] * num_actors
        note_taken(self._coordinator, self._name, bundles, expire_after_s=_EXPIRES_S, spread=self._spread)
