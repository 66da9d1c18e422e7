"""One exception tree: every failure that a user can cause says what, got, expected and how to fix."""

from __future__ import annotations

from collections.abc import Mapping


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
    """The reward pool could not answer: dead actors, a timeout, or a non-finite reward."""


class NonFiniteError(CtrlRayError, FloatingPointError):
    """A loss, gradient or reward became NaN or infinite; raised before the optimizer step, which is not made."""


class RunFolderError(CtrlRayError, FileExistsError):
    """The output folder holds another run, or lacks the run that should be resumed."""


class ResourceError(CtrlRayError, RuntimeError):
    """The cluster has fewer CPUs, GPUs or nodes than the run asks for."""


class CheckpointError(CtrlRayError, OSError):
    """A checkpoint could not be written, usually because a disk is full; the last good one is intact."""


class InterruptedRunError(CtrlRayError, KeyboardInterrupt):
    """The run was stopped by the user after it had left a checkpoint."""


HOPELESS = (ConfigError, DataError, ModelError, NonFiniteError)
"""Errors that the same run would meet again from the same checkpoint: no restart cures them."""


def own_error(error: BaseException) -> CtrlRayError | None:
    """The CtrlRayError behind an error that crossed Ray (task, actor, or a Train worker group), if there is one."""
    seen: set[int] = set()
    queue: list[object] = [error]
    while queue:
        current = queue.pop(0)
        if id(current) in seen or current is None:
            continue
        seen.add(id(current))
        if isinstance(current, CtrlRayError):
            return current
        queue += [getattr(current, "cause", None), getattr(current, "__cause__", None)]
        failures = getattr(current, "worker_failures", None)
        if isinstance(failures, Mapping):
            queue += list(failures.values())
    return None
