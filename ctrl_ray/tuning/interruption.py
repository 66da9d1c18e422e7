"""Ctrl-C and SIGTERM while Ray Tune runs trials."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ctrl_ray.cluster.variables import set_meanwhile

_STOPPING = b"\nstopping; the sweep's state is being written (once more: at once)\n"


@contextmanager
def interruptible_tune() -> Iterator[None]:
    """At Ctrl-C or SIGTERM inside, Ray Tune writes its state and ends the trials' actors; then KeyboardInterrupt is raised.

    A second signal raises it at once. Ray Tune's own handler would return from `fit` as if all were done, with the trials
    that it ended marked as terminated; so it is told by the signal that it always listens to, SIGUSR1. Only the main
    thread gets signals; elsewhere nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if received.is_set():
            raise KeyboardInterrupt
        received.set()
        os.write(2, _STOPPING)  # print() may be in the middle of a line, and cannot be entered twice
        os.kill(os.getpid(), signal.SIGUSR1)

    def interrupt_at_once(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    handlers: dict[signal.Signals, Any] = {signal.SIGINT: interrupt, signal.SIGTERM: interrupt}
    handlers[signal.SIGUSR1] = interrupt_at_once  # until Ray Tune takes it
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        with set_meanwhile({"TUNE_DISABLE_SIGINT_HANDLER": "1"}):
            yield
        if received.is_set():
            raise KeyboardInterrupt
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
