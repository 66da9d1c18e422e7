"""The exception tree: one base, messages that survive the way between processes."""

from __future__ import annotations

import errno
import inspect
import pickle

import pytest

from ctrl_ray import errors

ALL = [
    member
    for _, member in inspect.getmembers(errors, inspect.isclass)
    if issubclass(member, errors.CtrlRayError) and member.__module__ == errors.__name__
]


def test_the_tree_holds_what_users_are_promised() -> None:
    names = {error.__name__ for error in ALL}
    assert names >= {
        *("ConfigError", "CtrlRayError", "DataError", "InterruptedRunError", "ModelError"),
        *("NonFiniteError", "ResourceError", "RewardError", "RunFolderError"),
    }


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (errors.ConfigError, ValueError),
        (errors.DataError, ValueError),
        (errors.ModelError, ValueError),
        (errors.RewardError, RuntimeError),
        (errors.ResourceError, RuntimeError),
        (errors.NonFiniteError, ArithmeticError),
    ],
)
def test_errors_are_also_what_a_plain_except_clause_expects(error: type[Exception], builtin: type[Exception]) -> None:
    with pytest.raises(builtin):
        raise error("what, got, expected, fix")


@pytest.mark.parametrize("error", ALL)
def test_errors_survive_pickling(error: type[Exception]) -> None:
    message = "global_batch_size (96) must be divisible by 8 × 5"
    copy = pickle.loads(pickle.dumps(error(message)))
    assert type(copy) is error
    assert str(copy) == message
    assert copy.args == (message,)


def test_a_full_disk_is_found_and_said() -> None:
    """Wherever it was met: in a library's own words, behind an error of Ray's; any other error is none."""
    wrapper = RuntimeError("ray")
    wrapper.__cause__ = OSError(errno.ENOSPC, "No space left on device", "/data/metrics.jsonl")
    for error in (
        wrapper,
        OSError(errno.EDQUOT, "Disk quota exceeded", "/data/metrics.jsonl"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ):
        found = errors.full_disk(error)
        assert isinstance(found, errors.ResourceError)
        assert str(found).startswith("a disk is full: ") and "make room" in str(found) and "--resume" in str(found)
    assert "'/data/metrics.jsonl'" in str(errors.full_disk(wrapper))
    assert errors.full_disk(PermissionError(errno.EACCES, "Permission denied", "/data")) is None


def test_own_error_is_found_behind_rays() -> None:
    """Through causes and through a worker group's failures."""
    mine = errors.ModelError("what")
    wrapper = RuntimeError("ray")
    wrapper.__cause__ = mine
    group = RuntimeError("group")
    group.worker_failures = {0: wrapper}  # type: ignore[attr-defined]
    assert errors.own_error(group) is mine
    assert errors.own_error(RuntimeError("other")) is None
