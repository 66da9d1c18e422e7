"""How many actors a pool should have: a decision from the number of unfinished requests, with hysteresis."""

from __future__ import annotations


class Scaler:
    """Grows where requests wait behind busy actors, shrinks where actors have nothing to do.

    Between the two (as many unfinished requests as actors) nothing changes, and each condition must hold without a
    break for its time; a change starts both times anew.
    """

    def __init__(self, smallest: int, largest: int, *, grow_after_s: float, shrink_after_s: float) -> None:
        self._smallest, self._largest = smallest, largest
        self._grow_after_s, self._shrink_after_s = grow_after_s, shrink_after_s
        self._busy_since: float | None = None
        self._idle_since: float | None = None

    def decide(self, now_s: float, num_actors: int, unfinished: int, *, starting: int = 0) -> int:
        """+1, −1 or 0 actors, at time now_s; to be asked at every change of the load.

        num_actors counts those that start; nothing is added to them until they have started.
        """
        crowded, slack = unfinished > num_actors and not starting, unfinished < num_actors
        self._busy_since = (now_s if self._busy_since is None else self._busy_since) if crowded else None
        self._idle_since = (now_s if self._idle_since is None else self._idle_since) if slack else None
        change = 0
        if num_actors < self._largest and _lasted(self._busy_since, now_s, self._grow_after_s):
            change = 1
        elif num_actors > self._smallest and _lasted(self._idle_since, now_s, self._shrink_after_s):
            change = -1
        if change:
            self._busy_since = self._idle_since = None
        return change


def _lasted(since_s: float | None, now_s: float, duration_s: float) -> bool:
    return since_s is not None and now_s - since_s >= duration_s
