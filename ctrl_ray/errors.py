"""One exception tree: every failure that a user can cause says what, got, expected and how to fix."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class CtrlRayError(Exception):
    """Base of every error this package raises on purpose; its text is the whole message for the user.

    All of them survive pickling (one positional message, no extra state), because they cross processes.
    """


class ConfigError(CtrlRayError, ValueError):
    """A configuration value, or a combination of them, that cannot run."""


class DataError(CtrlRayError, ValueError):
    """The offline data set (file, column, row, image or label) is not what the schema asks for."""


class ModelError(CtrlRayError, ValueError):
    """A model folder, adapter or classifier that cannot be loaded or does not fit its base model."""


class RewardError(CtrlRayError, RuntimeError):
    """The reward pool could not answer: dead actors, or a timeout."""


class NonFiniteError(CtrlRayError, FloatingPointError):
    """A loss, gradient or reward became NaN or infinite; raised before the optimizer step, which is not made."""


class RunFolderError(CtrlRayError, FileExistsError):
    """The output folder holds another run, or lacks the run that should be resumed."""


class ResourceError(CtrlRayError, RuntimeError):
    """The cluster has fewer CPUs, GPUs or nodes than the run asks for."""


class GpuMemoryError(CtrlRayError, RuntimeError):
    """A GPU has too little memory for the run's settings; the same run would meet that again."""


class CheckpointError(CtrlRayError, OSError):
    """A checkpoint could not be written, usually because a disk is full; an earlier one is intact."""


class InterruptedRunError(CtrlRayError, KeyboardInterrupt):
    """The run was stopped by the user after it had left a checkpoint."""


_SHOWN_PATH = 200

HOPELESS = (ConfigError, DataError, ModelError, NonFiniteError, GpuMemoryError)
"""Errors that the same run would meet again from the same checkpoint: no restart cures them."""


_PHASES = {
    ("ctrl_ray.gradients.rollout", "rollout"): "in a rollout",
    ("ctrl_ray.gradients.adjoint", "adjoint_pass"): "in the adjoint pass",
    ("ctrl_ray.baselines.cfg_finetuning", "denoising_loss"): "in the forward of the denoising loss",
    ("ctrl_ray.distributed.engine", "step"): "in the optimizer step",
    ("ctrl_ray.rewards.model", "evaluate"): "while samples were scored",
    ("ctrl_ray.policy.decoder", "decode"): "while images were decoded",
}
"""What a function (by module and name) does, for people."""


@contextmanager
def naming_memory(what: str) -> Iterator[None]:
    """Inside, torch's OutOfMemoryError (or CUDA's own) becomes a GpuMemoryError that says `what` was done, in which phase,
    and how much was asked for. Also a decorator. The phase is read from the traceback: the innermost of `_PHASES`.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        phases = [_PHASES.get((frame.f_globals.get("__name__", ""), frame.f_code.co_name)) for frame in frames]
        where = ", ".join([what, *[phase for phase in phases if phase][-1:]])
        raise GpuMemoryError(f"out of GPU memory: {where}: {_amounts(str(error))}") from error


def _is_out_of_memory(error: RuntimeError) -> bool:
    if isinstance(error, CtrlRayError):
        return False
    return type(error).__name__ == "OutOfMemoryError" or ("CUDA" in str(error) and "out of memory" in str(error))


def _amounts(text: str) -> str:
    """What torch says, in one line: 'torch tried to allocate 2.00 GiB on a card of 22.00 GiB, of which 1.00 GiB was free'."""
    tried = re.search(r"allocate ([\d.]+ \w+)", text)
    card = re.search(r"capacity of ([\d.]+ \w+)", text)
    free = re.search(r"of which ([\d.]+ \w+) is free", text)
    if tried is None or card is None:
        return (text.strip().splitlines() or ["nothing more is known"])[0].rstrip(".")
    line = f"torch tried to allocate {tried[1]} on a card of {card[1]}"
    return line + (f", of which {free[1]} was free" if free else "")


def own_error(error: BaseException) -> CtrlRayError | None:
    """The CtrlRayError behind an error that crossed Ray (task, actor, or a Train worker group), if there is one."""
    return next((found for found in _behind(error) if isinstance(found, CtrlRayError)), None)


_FULL = ("No space left on device", "os error 28", "os error 122")
"""What libraries that are written in other languages say of it, without a number."""


def full_disk(error: BaseException) -> ResourceError | None:
    """What to tell of an error that comes of a full disk, or of a quota that is used up; None for any other."""
    for found in _behind(error):
        full = isinstance(found, OSError) and found.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or any(text in str(found) for text in _FULL):
            return ResourceError(
                f"a disk is full: {str(found).strip().splitlines()[-1]}; make room (df -h, or your quota), then give the same "
                "command again (with --resume where its output folder is still there)"
            )
    return None


_UNUSABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.ESTALE}
)


def unusable_path(error: BaseException) -> ConfigError | None:
    """What to tell of a path that the system refuses, and of which nothing better is said; None for any other error."""
    for found in _behind(error):
        if isinstance(found, OSError) and found.errno in _UNUSABLE:
            name = os.fsencode(found.filename or str(found)).decode("utf-8", "backslashreplace")
            shown = name if len(name) <= _SHOWN_PATH else f"{name[:_SHOWN_PATH]}… ({len(name)} characters)"
            return ConfigError(
                f"{shown} cannot be used: {os.strerror(found.errno)}; expected a file or folder that is there and that this "
                "user may read or write; check the path and its rights"
            )
    return None


def _behind(error: BaseException) -> Iterator[object]:
    """The error, and those that it was made of."""
    seen: set[int] = set()
    queue: list[object] = [error]
    while queue:
        current = queue.pop(0)
        if id(current) in seen or current is None:
            continue
        seen.add(id(current))
        yield current
        queue += [getattr(current, "cause", None), getattr(current, "__cause__", None)]
        failures = getattr(current, "worker_failures", None)
        if isinstance(failures, Mapping):
            queue += list(failures.values())
