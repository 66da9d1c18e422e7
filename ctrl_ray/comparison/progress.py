"""How far a comparison is: lines with the share that is drawn and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable

from ctrl_ray.wording import duration

_EVERY_S = 10.0
_FIRST_SHARE = 0.05
"""Of all images that are drawn before a pace is told: the first few wait for models to load."""


class Progress:
    """Counts nominal cost, in plain samples; time is that of drawing alone, so that what is found on disk and what is trained
    in between do not count."""

    def __init__(self, total: float, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        """total: nominal cost of everything."""
        self._total, self._say, self._clock = total, say, clock
        self._done, self._drawn, self._seconds = 0.0, 0.0, 0.0
        self._last = clock()
        self.what = ""
        """What is being drawn; the lines begin with it."""

    def drawn(self, units: float, seconds: float | None) -> None:
        """So much is done; seconds: that it took, None for what was there already. Says so every ten seconds at most."""
        self._done += units
        if seconds is not None:
            self._drawn += units
            self._seconds += seconds
        if self._clock() - self._last >= _EVERY_S:
            self._last = self._clock()
            self._say(f"{self.what}: {self.share:.0%} of all images{self.left}")

    def reached(self, units: float) -> None:
        """Everything up to here is done, whatever it really took: dear values that were not chosen are not drawn."""
        self._done = max(self._done, units)

    @property
    def share(self) -> float:
        """Of the nominal cost."""
        return min(1.0, self._done / self._total)

    @property
    def left(self) -> str:
        """' · 12 m 05 s left to draw', or '' while too little was drawn."""
        if self._drawn < _FIRST_SHARE * self._total:
            return ""
        return f" · {duration(max(0.0, self._total - self._done) * self._seconds / self._drawn)} left to draw"
