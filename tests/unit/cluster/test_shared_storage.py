"""Which hosts share a run's output folder; hosts are asked through Ray, for which a stand-in answers here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from ctrl_ray.cluster import shared_storage
from ctrl_ray.cluster.shared_storage import _missing, _not_sharing
from ctrl_ray.runs.folder import RunFolder


class Hosts:
    """Hosts 'here', which see this file system, and 'away', which do not."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, hosts: Sequence[str], paths: list[str], patience_s: float = 0.0) -> dict[str, list[str]]:
        assert patience_s > 0, "a network filesystem may show a new file late"
        self.asked += paths
        assert all(Path(path).is_file() for path in paths), "the file is there while the hosts look for it"
        return {host: paths for host in hosts if host.startswith("away")}


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Hosts:
    hosts = Hosts()
    monkeypatch.setattr(shared_storage, "_missing_on", hosts)
    return hosts


def test_hosts_that_do_not_see_our_file_do_not_share_the_folder(hosts: Hosts, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "runs" / "mine"))
    assert _not_sharing(folder, ["here1", "away1", "here2", "away2"]) == ["away1", "away2"]
    assert _not_sharing(folder, ["here1"]) == []
    assert [Path(path).parent for path in hosts.asked] == [folder.local] * 2
    assert hosts.asked[0] != hosts.asked[1], "a name of its own: what a host saw before proves nothing"


def test_the_question_leaves_nothing_behind(hosts: Hosts, tmp_path: Path) -> None:
    """A refused run leaves no folder; a folder that was there, or is used meanwhile, stays with what is in it."""
    folder = RunFolder(str(tmp_path / "mine"))
    _not_sharing(folder, ["away"])
    assert not folder.local.exists()
    folder.local.mkdir()
    _not_sharing(folder, ["away"])
    assert folder.local.is_dir() and not list(folder.local.iterdir())
    (folder.local / "config.json").touch()
    _not_sharing(folder, ["here"])
    assert [path.name for path in folder.local.iterdir()] == ["config.json"]


def test_nobody_is_asked_where_there_is_one_host(hosts: Hosts, tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "mine"))
    assert _not_sharing(folder, []) == []
    assert hosts.asked == [] and not folder.local.exists()


def test_an_error_while_asking_leaves_nothing_either(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise OSError("the cluster is gone")

    monkeypatch.setattr(shared_storage, "_missing_on", breaks)
    folder = RunFolder(str(tmp_path / "mine"))
    with pytest.raises(OSError, match="the cluster is gone"):
        _not_sharing(folder, ["away"])
    assert not folder.local.exists()


def test_a_host_looks_until_its_patience_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Looks at 0, 1, 2 s; the file comes after the second look."""
    clock, late = [0.0], tmp_path / "late"

    def sleep(seconds: float) -> None:
        clock[0] += 1.0
        if clock[0] == 2.0:
            late.touch()

    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    assert _missing([str(tmp_path), str(late)], patience_s=0.5) == [str(late)]
    assert not late.exists() and clock[0] == 1.0
    assert _missing([str(tmp_path), str(late)], patience_s=5.0) == []
    assert clock[0] == 2.0
