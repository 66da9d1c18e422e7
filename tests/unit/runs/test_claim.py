"""One process at a time writes an output folder; a start that failed leaves nothing."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow.fs
import pytest

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.errors import ConfigError, DataError, RunFolderError
from ctrl_ray.runs.claim import CLAIM_FILE, claimed
from ctrl_ray.runs.folder import RunFolder
from ctrl_ray.tuning.space import Space
from ctrl_ray.tuning.sweep_folder import SweepFolder

GIVEN = ControlConfig(classes=("a", "b"), classifier="/somewhere")
FITTED = ControlConfig(classes=("a", "b"))
CONFIG = TrainConfig(controls={"given": GIVEN, "fitted": FITTED})


def _write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")


def test_a_second_process_is_refused_and_says_who_is_there(tmp_path: Path) -> None:
    """Also one that would resume; the first one's claim stays. In the end nothing is left of it."""
    folder = tmp_path / "new" / "run"
    with claimed(folder):
        for resume in (False, True):
            says = rf"run is in use: process {os.getpid()} on .* writes there now"
            second = RunFolder(str(folder))
            with pytest.raises(RunFolderError, match=says), second.claimed(CONFIG, resume=resume):
                pytest.fail("two had it at once")
        assert [path.name for path in folder.iterdir()] == [CLAIM_FILE]
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_claimed_without_its_folder(tmp_path: Path) -> None:
    """Two data sets may be written side by side."""
    data = tmp_path / "data"
    again = pytest.raises(RunFolderError, match=r"output .*/data/a\.parquet is in use")
    with claimed(data, "a.parquet"), claimed(data, "b.parquet"), again, claimed(data, "a.parquet"):
        pytest.fail("two had it at once")
    assert list(tmp_path.iterdir()) == []


def test_the_claim_of_a_killed_process_is_stale(tmp_path: Path) -> None:
    """Its file is there, and its lock is not."""
    (tmp_path / CLAIM_FILE).write_text("process 1 on elsewhere\n")
    with claimed(tmp_path):
        assert (tmp_path / CLAIM_FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert tmp_path.is_dir() and list(tmp_path.iterdir()) == [], "a folder that was there before stays"


def test_a_claim_that_its_owner_takes_away_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening and locking: the lock is then on a file without a name, which the next process would not see."""
    lock, calls = fcntl.flock, []

    def flock(file: object, how: int) -> None:
        if not calls:
            (tmp_path / CLAIM_FILE).unlink()
        calls.append(how)
        lock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(tmp_path):
        assert len(calls) == 2
        with pytest.raises(RunFolderError, match="is in use"), claimed(tmp_path):
            pytest.fail("two had it at once")


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: object, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with claimed(tmp_path / "run"):
        _write(tmp_path / "run" / "data")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["data"]


def test_a_start_that_failed_leaves_nothing_and_the_same_command_runs(tmp_path: Path) -> None:
    """Copies of what was given, empty folders and halves are worth nothing."""
    folder = RunFolder(str(tmp_path / "runs" / "mine"))
    for _ in range(2):
        with pytest.raises(DataError, match="row 7"), folder.claimed(CONFIG, resume=False):
            folder.prepare(CONFIG, resume=False)
            assert (folder / "config.json").is_file()
            for name in ("given/model.safetensors", "fitted/.fit-1/examples/0", ".given.draft/model.safetensors"):
                _write(folder / "classifier" / name)
            assert not folder.has_begun(CONFIG)
            raise DataError("row 7")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("result", ["classifier/fitted/classifier.json", "pre_trained.safetensors", "checkpoints/x/a"])
def test_what_was_computed_stays(result: str, tmp_path: Path) -> None:
    """And the same command says how to go on."""
    folder = RunFolder(str(tmp_path / "mine"))
    with pytest.raises(KeyboardInterrupt), folder.claimed(CONFIG, resume=False):
        folder.prepare(CONFIG, resume=False)
        _write(folder / result)
        assert folder.has_begun(CONFIG)
        raise KeyboardInterrupt
    assert (folder / result).is_file() and not (folder / CLAIM_FILE).exists()
    with pytest.raises(RunFolderError, match=r"already holds a run.*--resume"), folder.claimed(CONFIG, resume=False):
        pytest.fail("the run was overwritten")
    with pytest.raises(DataError), folder.claimed(CONFIG, resume=True):
        raise DataError("a start from a checkpoint that failed")
    assert (folder / result).is_file() and (folder / "config.json").is_file()


def test_a_run_that_was_killed_says_how_to_go_on(tmp_path: Path) -> None:
    """Before anything was finished too: its config.json and a stale claim are there, and are not taken for a failed start."""
    folder = RunFolder(str(tmp_path))
    folder.prepare(CONFIG, resume=False)
    (tmp_path / CLAIM_FILE).write_text("process 1 on elsewhere\n")
    with pytest.raises(RunFolderError, match=r"already holds a run.*--resume"), folder.claimed(CONFIG, resume=False):
        pytest.fail("the run was overwritten")
    assert (tmp_path / "config.json").is_file()
    with folder.claimed(CONFIG, resume=True):
        folder.prepare(CONFIG, resume=True)
    with (
        pytest.raises(ConfigError, match="cannot resume"),
        folder.claimed(dataclasses.replace(CONFIG, kl_coef=2.0), resume=True),
    ):
        pytest.fail("resumed with other settings")
    assert (tmp_path / "config.json").is_file()


def test_files_of_the_user_are_never_taken_away(tmp_path: Path) -> None:
    _write(tmp_path / "config.json.notes")
    folder = RunFolder(str(tmp_path))
    with pytest.raises(RunFolderError, match="already holds files"), folder.claimed(CONFIG, resume=False):
        pytest.fail("written between others' files")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json.notes"]


def test_a_run_elsewhere_leaves_nothing_there_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A remote folder that is a local one under another name."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "remote").mkdir()
    there = pyarrow.fs.LocalFileSystem(), str(tmp_path / "remote" / "run")
    monkeypatch.setattr("pyarrow.fs.FileSystem", SimpleNamespace(from_uri=lambda uri: there))
    folder = RunFolder("s3://bucket/run")
    with pytest.raises(DataError), folder.claimed(CONFIG, resume=False):
        folder.prepare(CONFIG, resume=False)
        assert (tmp_path / "remote" / "run" / "config.json").is_file()
        raise DataError("row 7")
    assert not (tmp_path / "remote" / "run" / "config.json").exists()
    with folder.claimed(CONFIG, resume=False):
        folder.prepare(CONFIG, resume=False)
    assert sorted(path.name for path in (tmp_path / "remote" / "run").iterdir()) == ["config.json"]


def test_a_sweep_that_failed_to_start_leaves_nothing(tmp_path: Path) -> None:
    """And one that has a trial stays."""
    folder = SweepFolder.at(str(tmp_path / "sweep"))
    space = Space(name="mine", values={})
    with pytest.raises(DataError), folder.claimed(space, CONFIG, 3, resume=False) as wanted:
        assert wanted == 3 and (folder.path / "sweep.json").is_file() and (folder.path / "space.py").is_file()
        raise DataError("row 7")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError), folder.claimed(space, CONFIG, 3, resume=False):
        _write(folder.path / "trials" / "00000" / "metrics.jsonl")
        raise DataError("later")
    again = folder.claimed(space, CONFIG, 3, resume=False)
    with pytest.raises(RunFolderError, match=r"already holds a sweep.*--resume"), again:
        pytest.fail("the sweep was overwritten")
    with folder.claimed(space, CONFIG, None, resume=True) as wanted:
        assert wanted == 3
