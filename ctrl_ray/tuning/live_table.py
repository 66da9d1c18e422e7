"""A table that shows how things stand: redrawn in place on a terminal and in a notebook, printed anew in a log."""

from __future__ import annotations

import math
import shutil
import sys
import time
from typing import Any


class LiveTable:
    """Shows a text of several lines again and again.

    Args:
        every_s: Seconds between two drawings in place.
        log_every_s: Seconds between two prints where nothing can be redrawn.
    """

    def __init__(self, *, every_s: float = 1.0, log_every_s: float = 60.0) -> None:
        self._handle: Any = _notebook_handle()
        self._in_place = self._handle is not None or sys.stdout.isatty()
        self._every_s = every_s if self._in_place else log_every_s
        self._last, self._last_time, self._height = "", -math.inf, 0

    def show(self, text: str, *, now: bool = False) -> None:
        """Draw `text` when it is time and has changed; `now` draws a change at once."""
        if text == self._last or (not now and time.monotonic() - self._last_time < self._every_s):
            return
        self._last, self._last_time = text, time.monotonic()
        if self._handle is not None:
            self._handle.update({"text/plain": text}, raw=True)
        elif self._in_place:
            up = f"\x1b[{self._height}F\x1b[J" if self._height else ""
            width = shutil.get_terminal_size().columns - 1  # a line that wraps would be two lines to go up
            lines = [line[:width] for line in text.splitlines()]
            sys.stdout.write(up + "\n".join(lines) + "\n")
            self._height = len(lines)
        else:
            sys.stdout.write(f"{text}\n\n")
        sys.stdout.flush()


def _notebook_handle() -> Any:
    """IPython's handle on an output that can be replaced; None outside of a notebook."""
    if "ipykernel" not in sys.modules:
        return None
    from IPython.display import display

    return display({"text/plain": ""}, raw=True, display_id=True)
