"""Starting Ray on this machine: what it cannot take is said before it starts, and what went wrong in one message."""

from __future__ import annotations

import logging
import os
import resource
import signal
import threading
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray

from ctrl_ray.cluster.variables import set_meanwhile
from ctrl_ray.errors import ConfigError, ResourceError
from ctrl_ray.ray_internals import silent_token_notice, socket_path, start_tells
from ctrl_ray.runs.outputs import check_output

_LONGEST_SOCKET = 107
"""Bytes of a socket's path on Linux."""
_FEWEST_FILES = 256
"""Open files that a local Ray and a few workers need; with 64 its processes die one after the other."""
_OBJECT_STORE_BYTES = 512 * 2**20
_OF_ONE_MACHINE = {"RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""In the environment of a local Ray's processes, unless the user says otherwise. Nobody announces that the machine is taken
away, and each worker group would have a process (200 MB, two CPU seconds) that waits for it."""


def start_local_ray(num_cpus: int | None, *, verbose: bool) -> None:
    """Start a Ray of our own on this machine.

    num_cpus: None: this machine's, at least 2. ConfigError for what Ray cannot take of the environment, with the remedy;
    ResourceError where it does not come up.
    """
    check_environment()
    _bring_a_token()
    variables = {name: os.environ.get(name, value) for name, value in _OF_ONE_MACHINE.items()}
    with silent_token_notice(), set_meanwhile(variables):
        init_ray(
            "Ray did not start on this machine",
            "The machine may be too busy, or short of memory (RAM, /dev/shm), of room on the disk or of processes (ulimit -u): "
            "look at Ray's logs there, then give the same command again",
            address="local",
            num_cpus=num_cpus or max(2, os.cpu_count() or 2),
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=verbose,
            logging_level=logging.WARNING,
        )


def init_ray(what: str, remedy: str, **options: Any) -> None:
    """`ray.init(**options)`; where that fails, nothing is left of it and a ResourceError says `what`, why, and `remedy`.

    What SIGTERM did before, it does afterwards: Ray's own handler would end the process with a stack of its core.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options)
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
    except SystemExit as end:
        if end.code != signal.SIGTERM:
            raise
        with suppress(Exception):
            ray.shutdown()
        raise KeyboardInterrupt from None  # Ray's handler has had the signal meanwhile
    except Exception as error:
        told = start_tells(error)
        with suppress(Exception):
            ray.shutdown()
        raise ResourceError(f"{what}: {told}. {remedy}") from error


def check_environment() -> None:
    """ConfigError, with the variable or the limit and the remedy, for what a local Ray cannot start with."""
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), "TMPDIR")
    folder = os.environ.get(variable, "/tmp")
    remedy = "give a short path of plain letters, e.g. RAY_TMPDIR=/tmp (Ray's own files alone go there)"
    if not folder.isascii():
        raise ConfigError(
            f"{variable} is {folder!r}, where Ray would keep its sockets, and Ray takes ASCII characters only; {remedy}"
        )
    if (size := len(socket_path(folder))) > _LONGEST_SOCKET:
        raise ConfigError(
            f"{variable} is {folder!r}, too long for Ray: its sockets there would have paths of {size} bytes, and "
            f"{_LONGEST_SOCKET} are possible: {variable} may have {len(folder) - size + _LONGEST_SOCKET}; {remedy}"
        )
    check_output(os.path.join(folder, "ray"), variable)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most != resource.RLIM_INFINITY and most < _FEWEST_FILES:
        raise ConfigError(
            f"this session may have {most} open files (ulimit -Hn), and Ray needs at least {_FEWEST_FILES}; raise the limit, "
            "e.g. ulimit -n 8192 (a batch system or a container has a setting of its own for it)"
        )


def _bring_a_token() -> None:
    """Ray keeps the token of its local clusters in the home folder. Where that cannot be written, this process and those
    that it starts have one of their own."""
    if any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        return
    try:
        file = Path.home() / ".ray" / "auth_token"
        if not os.access(file, os.R_OK):
            check_output(file, "HOME", kind="file")
    except (RuntimeError, ConfigError):  # RuntimeError: a user without a home folder
        os.environ["RAY_AUTH_TOKEN"] = uuid.uuid4().hex
