"""The common end of all commands: what becomes of an error, of Ctrl-C and of a closed pipe.

| exit status | meaning | errors |
|---|---|---|
| 0 | done | |
| 1 | the run failed | RewardError, NonFiniteError, ResourceError, CheckpointError; any other exception, with its traceback |
| 2 | you can correct it, then run it again | ConfigError, DataError, ModelError, RunFolderError, GpuMemoryError; a wrong flag |
| 130 | interrupted | Ctrl-C; SIGTERM |

`verify` also ends with 1 when a bar is missed, and `tune` when no trial finished.

An error of `ctrl_ray.errors`, a disk that is full or a path that the system refuses is one message on standard error, even
where Ray carried it from another process. With CTRL_RAY_VERBOSE=1 its traceback comes first. When nobody reads the output any
more (`| head`), the command ends in silence.
A sign that the terminal's encoding does not have (× in ASCII) is shown as '?'.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from ctrl_ray.collector import collect_seldom
from ctrl_ray.config.values import named_values as named_values
from ctrl_ray.errors import (
    ConfigError,
    CtrlRayError,
    DataError,
    GpuMemoryError,
    InterruptedRunError,
    ModelError,
    RunFolderError,
    full_disk,
    own_error,
    unusable_path,
)
from ctrl_ray.runs.copies import private_folder

Body = Callable[[Sequence[str]], int | None]
"""What a command does with its arguments; it returns None when it is done, or an exit status of its own."""
FAILED, CORRECTABLE, INTERRUPTED = 1, 2, 130
CLASSIFIER_EXAMPLE = "jpeg_size=RUN/classifier/jpeg_size"
"""What `--classifier` wants."""
_CORRECTABLE_ERRORS = (ConfigError, DataError, ModelError, RunFolderError, GpuMemoryError)


def exponents(arguments: Sequence[str]) -> dict[str, float]:
    """Numbers by control of the flag --exponent; ConfigError for what is none."""
    found = {}
    for name, text in named_values("--exponent", arguments, "jpeg_size=4").items():
        try:
            found[name] = float(text)
        except ValueError as error:
            raise ConfigError(f"--exponent {name}={text} is not a number; example: jpeg_size=4") from error
    return found


def run(body: Body, argv: Sequence[str] | None = None) -> int:
    """Call a command's body and return the exit status; the module's docstring has the table.

    argv: The arguments; None: those of the process. Raises what is neither an error of `ctrl_ray.errors` nor an interrupt,
    and SystemExit, with which the parser of the flags ends.
    """
    for stream in (sys.stdout, sys.stderr):
        _show_what_can_be_shown(stream)
    _do_without_a_home()
    collect_seldom()
    try:
        with _sigterm_interrupts():
            return body(sys.argv[1:] if argv is None else argv) or 0
    except (Exception, KeyboardInterrupt) as error:
        if isinstance(error, BrokenPipeError) and _drop_what_nobody_reads():
            return FAILED
        known = own_error(error) or (error if isinstance(error, KeyboardInterrupt) else None)
        known = known or full_disk(error) or unusable_path(error)
        if known is None:
            raise
        if os.environ.get("CTRL_RAY_VERBOSE"):
            _say("".join(traceback.format_exception(error)).rstrip())
        if isinstance(known, KeyboardInterrupt):
            # the terminal has written ^C, or a progress bar, at the start of this line
            _say(("\n" if sys.stderr.isatty() else "") + (str(known) or "interrupted"))
            # An interrupt that has passed through exec() of a string, as in an import that makes dataclasses, leaves a mark
            # by which `python -m` ends with a signal instead of our status. The next exec() takes it away.
            exec("")
            return INTERRUPTED
        _say(f"error: {known}")
        return status_of(known)
    finally:
        _drop_what_nobody_reads()


def status_of(error: CtrlRayError) -> int:
    """The exit status that stands for this error."""
    if isinstance(error, InterruptedRunError):
        return INTERRUPTED
    return CORRECTABLE if isinstance(error, _CORRECTABLE_ERRORS) else FAILED


@contextmanager
def stoppable(where: str, has_begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does, and both become an InterruptedRunError that says how to go on.

    where: The folder that holds what was finished. has_begun: Whether anything is there, asked after the signal. An
    InterruptedRunError from inside, which says it better, passes. Only the main thread gets signals; in another one nothing
    is changed.
    """

    try:
        with _sigterm_interrupts():
            yield
    except InterruptedRunError:
        raise
    except KeyboardInterrupt:
        again = "stopped; nothing was finished. Give the same command again"
        if has_begun():
            again = f"stopped; what was finished is in {where}. Go on with the same command and --resume"
        raise InterruptedRunError(again) from None


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does; in another thread than the main one nothing is changed."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _say(text: str) -> None:
    with suppress(BrokenPipeError):
        print(text, file=sys.stderr, flush=True)


def _show_what_can_be_shown(stream: TextIO) -> None:
    """No sign that the stream's encoding lacks ends the command."""
    if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


def _do_without_a_home() -> None:
    """Where the home folder is missing or cannot be written, matplotlib has another one, about which it says nothing."""
    if not os.access(os.path.expanduser("~"), os.W_OK):
        with suppress(OSError):
            os.environ.setdefault("MPLCONFIGDIR", str(private_folder("matplotlib")))


def _drop_what_nobody_reads() -> bool:
    """Write out what is buffered; returns whether a reader of our output is gone. What is meant for that one goes to
    /dev/null from then on, or the interpreter would complain when it ends."""
    gone = [stream for stream in (sys.stdout, sys.stderr) if _reader_is_gone(stream)]
    for stream in gone:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())
    return bool(gone)


def _reader_is_gone(stream: TextIO) -> bool:
    try:
        stream.flush()
        poll = select.poll()
        poll.register(stream.fileno(), 0)
    except BrokenPipeError:
        return True
    except OSError:  # a stream in memory, as in a notebook, has no descriptor
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
