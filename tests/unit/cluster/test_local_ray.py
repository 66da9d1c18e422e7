"""What a local Ray cannot take of its surroundings is said before it starts; what goes wrong is one message."""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import ray

from ctrl_ray.cluster import local_ray
from ctrl_ray.cluster.local_ray import check_environment, init_ray, start_local_ray
from ctrl_ray.errors import ConfigError, ResourceError
from ctrl_ray.ray_internals import silent_token_notice, socket_path


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this session's environment."""
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_temporary_folder_is_too_long_by_one(variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """107 bytes of a socket's path are possible; the message has the number that is, and a remedy."""
    fits = 107 - len(socket_path(""))
    monkeypatch.setattr(local_ray, "check_output", lambda path, option: path)
    monkeypatch.setenv(variable, "/" + "x" * (fits - 2))
    check_environment()
    monkeypatch.setenv(variable, "/" + "x" * fits)
    with pytest.raises(ConfigError, match=rf"^{variable} is '/xxx.*too long.*have {fits - 1}; .*RAY_TMPDIR=/tmp"):
        check_environment()


def test_the_variable_that_ray_reads_first_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the remedy which the messages give works."""
    monkeypatch.setenv("TMPDIR", "/" + "x" * 100)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_environment()


def test_rays_sockets_take_ascii_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp/größe")
    with pytest.raises(ConfigError, match=r"^TMPDIR is '/tmp/größe'.*ASCII.*RAY_TMPDIR=/tmp"):
        check_environment()


def test_a_temporary_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc")
    with pytest.raises(ConfigError, match=r"'/proc/ray' of RAY_TMPDIR cannot be written"):
        check_environment()


def test_few_open_files_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hard limit counts: Ray raises the other one itself."""
    limits = {"is": (64, 64)}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits["is"])
    with pytest.raises(
        ConfigError, match=r"64 open files \(ulimit -Hn\), and Ray needs at least 256; .*ulimit -n 8192"
    ):
        check_environment()
    for limits["is"] in ((64, 4096), (64, resource.RLIM_INFINITY)):
        check_environment()


def test_a_token_of_its_own_where_there_is_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Token authentication stays on, and what the user set stays as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    local_ray._bring_a_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("HOME", "/proc/nobody")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    local_ray._bring_a_token()
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.delenv("RAY_AUTH_MODE")
    local_ray._bring_a_token()
    assert len(os.environ.pop("RAY_AUTH_TOKEN")) == 32
    assert list(tmp_path.iterdir()) == []


def test_a_ray_that_does_not_come_up_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what Ray says, in one line; nothing of it goes on running."""
    ended: list[str] = []

    def gives_up(**options: Any) -> None:
        raise Exception("The current node timed out during startup.\n  The GCS has become overloaded.")

    monkeypatch.setattr(ray, "init", gives_up)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append("shutdown"))
    says = (
        r"^Ray did not start: The current node timed out during startup\. The GCS has become overloaded\. Try again\.$"
    )
    with pytest.raises(ResourceError, match=says):
        init_ray("Ray did not start", "Try again.")
    assert ended == ["shutdown"]


@pytest.mark.parametrize(("said", "meanwhile"), [(None, "0"), ("1", "1")])
def test_rays_own_processes_watch_for_no_preemption(
    said: str | None, meanwhile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user says so; a cluster that this process joins later has its watcher."""
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    monkeypatch.delenv(name)
    if said is not None:
        monkeypatch.setenv(name, said)
    seen: list[str | None] = []
    monkeypatch.setattr(ray, "init", lambda **options: seen.append(os.environ.get(name)))
    start_local_ray(2, verbose=False)
    assert seen == [meanwhile] and os.environ.get(name) == said


def test_a_handler_of_sigterm_outlives_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray sets its own, which ends the process with a stack."""
    mine = lambda number, frame: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, mine)
    try:
        monkeypatch.setattr(ray, "init", lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
        init_ray("Ray did not start", "Try again.")
        assert signal.getsignal(signal.SIGTERM) is mine
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nobody had one: Ray's stays
        init_ray("Ray did not start", "Try again.")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_sigterm_while_ray_starts_is_an_interrupt_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's handler, which is there meanwhile, ends the process; another end stays as it is."""
    codes: list[int] = [signal.SIGTERM, 3]
    monkeypatch.setattr(ray, "init", lambda: sys.exit(codes.pop(0)))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(KeyboardInterrupt):
        init_ray("Ray did not start", "Try again.")
    with pytest.raises(SystemExit, match="3"):
        init_ray("Ray did not start", "Try again.")


def test_the_notice_of_the_token_is_silent_meanwhile() -> None:
    logger = logging.getLogger("ray._private.authentication.authentication_token_setup")
    assert logger.isEnabledFor(logging.WARNING)
    with silent_token_notice():
        assert not logger.isEnabledFor(logging.WARNING)
    assert logger.isEnabledFor(logging.WARNING)
