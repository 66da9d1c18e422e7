"""Connecting to Ray: the one that is there, the one that RAY_ADDRESS names, or a local one; with errors that say why not."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray

from ctrl_ray.cluster.local_ray import init_ray, start_local_ray
from ctrl_ray.errors import ConfigError, ResourceError
from ctrl_ray.ray_internals import ask_head, head_address, submitted_job

_PROBE_TIMEOUT_S = 10.0
_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
_ENOUGH_STOP_WAIT_S = 30


@contextmanager
def connected(num_cpus: int | None = None) -> Iterator[None]:
    """Use the Ray that is there (initialised, or named by RAY_ADDRESS), else start a local one and end it after.

    num_cpus: CPUs of a local Ray; None: this machine's, at least 2. ResourceError when RAY_ADDRESS names a cluster that
    does not answer or refuses the token, or a local one does not come up; ConfigError when what it names is no address of a
    cluster, or a local Ray cannot start in this environment (`local_ray.check_environment`).
    """
    if ray.is_initialized():
        yield
        return
    verbose = bool(os.environ.get("CTRL_RAY_VERBOSE"))
    if names_cluster():
        check_address(os.environ["RAY_ADDRESS"])
        init_ray(
            f"the Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']} does not take this process",
            "Use the Ray and the Python of its head, or unset RAY_ADDRESS for a local run",
            log_to_driver=verbose,
            logging_level=logging.WARNING,
        )
    else:
        start_local_ray(num_cpus, verbose=verbose)
    try:
        yield
    finally:
        ray.shutdown()


def names_cluster() -> bool:
    """Whether RAY_ADDRESS asks for a cluster that is already there."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def check_address(address: str) -> None:
    """Ask the cluster at `address` whether it is there and takes our token: `ray.init` would try for 20 s, and not tell
    which of the two was wrong.

    Raises ConfigError for what is no cluster's address and for a token file that cannot be read, ResourceError when
    nobody answers or the token is refused.
    """
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and 0 < int(port) < 2**16
    if address != "auto" and ("://" in address or "/" in host or not host.strip() or not is_port):
        raise ConfigError(
            f"RAY_ADDRESS is {address!r}; expected HOST:PORT of the cluster's head, 'auto' on one of its machines, or unset "
            "for a local run. From elsewhere submit the run: ray job submit --working-dir . -- python -m ctrl_ray.train"
        )
    _check_token_file()
    found = head_address(address)
    if found is None:
        raise ResourceError(
            "RAY_ADDRESS is 'auto', but no Ray runs on this machine; start one (ray start --head), or unset RAY_ADDRESS "
            "for a local run"
        )
    answer = ask_head(found, _PROBE_TIMEOUT_S)
    if answer.token_refused:
        raise ResourceError(
            f"the Ray cluster at {found} refuses the token: {_token_source()}. Give the cluster's token: RAY_AUTH_MODE="
            "token and RAY_AUTH_TOKEN_PATH=FILE (on its head the file is ~/.ray/auth_token)"
        )
    if not answer.alive:
        raise ResourceError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({answer.reason}); start it, give the right HOST:PORT, or "
            "unset RAY_ADDRESS for a local run"
        )


def _check_token_file() -> None:
    """Ray ends the process with a C++ stack when RAY_AUTH_TOKEN_PATH cannot be read."""
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    try:
        token = Path(path).expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(
            f"RAY_AUTH_MODE is 'token', but the token file {path} cannot be read ({error.strerror}); set RAY_AUTH_TOKEN_PATH "
            "to a file that holds the cluster's token, such as a copy of its head's ~/.ray/auth_token"
        ) from None
    if not token:
        raise ConfigError(f"the token file {path} (RAY_AUTH_TOKEN_PATH) is empty; expected the cluster's token in it")


def _token_source() -> str:
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        return "none was sent, because RAY_AUTH_MODE is not 'token'"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return "it is in RAY_AUTH_TOKEN"
    return f"it comes from {os.environ.get('RAY_AUTH_TOKEN_PATH') or '~/.ray/auth_token'}"


@dataclass(frozen=True)
class RayJob:
    """The Ray job that this process is the driver of."""

    submission_id: str
    stop_wait_s: int
    """Seconds between the signal of `ray job stop` and the end by force."""

    @property
    def hint(self) -> str:
        """What a person may want to do with it; a warning where a stop would leave no time for a checkpoint."""
        line = f"job        {self.submission_id}: ray job logs --follow {self.submission_id}, ray job stop {self.submission_id}"
        if self.stop_wait_s < _ENOUGH_STOP_WAIT_S:
            line += (
                f"\n           a stop leaves {self.stop_wait_s} s, perhaps too few for a checkpoint; submit with --runtime-env "
                f"cluster/job.yaml, which sets {_STOP_WAIT}"
            )
        return line


def ray_job() -> RayJob | None:
    """The job that `ray job submit` started this process for; None outside of one."""
    name = submitted_job()
    return RayJob(name, int(os.environ.get(_STOP_WAIT, "3"))) if name else None
