"""Outputs are tried before anything else is done, and nothing is left of the trial."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from ctrl_ray.errors import ConfigError
from ctrl_ray.runs.outputs import check_output


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, and the home folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("run", "run"),
        ("a/b/../c", "a/c"),
        ("~/runs/x", "runs/x"),
        ("läufe/größe 好", "läufe/größe 好"),
        ("my run #1 [50%25] & $HOME 'x' \"y\"", "my run #1 [50%25] & $HOME 'x' \"y\""),
        ("n" * 200, "n" * 200),
        ("n" * 255, "n" * 255),
        ("ö" * 127, "ö" * 127),
    ],
)
def test_an_output_is_absolute_and_nothing_is_made(here: Path, given: str, meant: str) -> None:
    """A second answer of the first is the same path."""
    assert check_output(given) == str(here / meant)
    assert check_output(check_output(given)) == str(here / meant)
    assert list(here.iterdir()) == []


def test_a_uri_passes_as_it_is() -> None:
    """Even one that cannot be opened: who opens it says so."""
    assert check_output("s3://bucket/runs/mine?region=eu") == "s3://bucket/runs/mine?region=eu"
    assert check_output("file:///tmp/x") == "/tmp/x"


def test_what_is_there_may_be_of_the_sort_that_is_meant(here: Path) -> None:
    (here / "folder").mkdir()
    (here / "folder" / "data.parquet").write_text("x")
    (here / "link").symlink_to(here / "folder")
    assert check_output("folder") == str(here / "folder")
    assert check_output("link/new") == str(here / "folder" / "new")
    assert check_output("folder/data.parquet", "--output", kind="file") == str(here / "folder" / "data.parquet")


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ("file/run", "folder", "{here}/file is a file, where a folder is meant"),
        ("file", "folder", "{here}/file is a file, where a folder is meant"),
        ("file/data.parquet", "file", "{here}/file is a file, where a folder is meant"),
        ("folder", "file", "{here}/folder is a folder, where a file is meant"),
        ("/dev/null", "folder", "/dev/null is no file and no folder, where a folder is meant"),
        ("pipe/x", "folder", "{here}/pipe is no file and no folder, where a folder is meant"),
        ("n" * 256, "folder", "has 256 bytes, 255 are possible"),
        ("ö" * 128 + "/run", "folder", "has 256 bytes, 255 are possible"),
        ("n" * 245, "file", "has 245 bytes, 239 are possible"),
        ("d/" * 2100 + "d", "folder", "the path is too long"),
    ],
)
def test_what_is_in_the_way_is_named(here: Path, given: str, kind: Any, words: str) -> None:
    """With the option, what was given, and what is there."""
    (here / "file").write_text("x")
    (here / "folder").mkdir()
    os.mkfifo(here / "pipe")
    with pytest.raises(ConfigError) as caught:
        check_output(given, "--out", kind=kind)
    assert str(caught.value).startswith(f"output {given!r} of --out cannot be written: ")
    assert words.format(here=here) in str(caught.value)
    assert str(caught.value).endswith(f"expected a {kind} that this user can write; give another --out")
    assert sorted(path.name for path in here.iterdir()) == ["file", "folder", "pipe"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("", "it is empty"),
        ("a\0b", "it holds a zero byte"),
        ("caf\udce9", "its bytes are not UTF-8"),
        ("~nobody-of-this-name/x", "home directory"),
    ],
)
def test_what_is_no_path_is_said(here: Path, given: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"of --output-dir is no path: .*{reason}.*give another --output-dir"):
        check_output(given)


def test_links_in_a_circle_are_no_path(here: Path) -> None:
    (here / "a").symlink_to("b")
    (here / "b").symlink_to("a")
    with pytest.raises(ConfigError, match=r"is no path|cannot be written"):
        check_output("a/run")


def test_a_folder_where_nobody_may_write_is_named() -> None:
    """Root neither: /proc takes no file."""
    with pytest.raises(ConfigError, match=r"output '/proc/run' of --output-dir cannot be written: /proc: "):
        check_output("/proc/run")


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.EACCES, "no permission to write there"),
        (errno.EROFS, "the file system is read-only"),
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the quota is used up"),
        (errno.EIO, r"writing there fails \(Input/output error\)"),
    ],
)
def test_the_reason_is_said(here: Path, number: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folder that was tried, not of the nameless file."""

    def refuses(*, dir: Path) -> None:
        raise OSError(number, os.strerror(number), str(dir / "tmp1234"))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuses)
    with pytest.raises(ConfigError, match=f"output 'a/b' of --output-dir cannot be written: {here}: {reason};"):
        check_output("a/b")
