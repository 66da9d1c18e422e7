"""Runs side by side: each in a process of its own, noted when it is finished; a failure or Ctrl-C ends all of them."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ctrl_ray.comparison.side_by_side import runs_at_a_time, sharing, train_command, train_side_by_side
from ctrl_ray.comparison.training import TrainedRun, is_finished, note_finished
from ctrl_ray.config import TrainConfig
from ctrl_ray.config.json import train_config_from_json
from ctrl_ray.config.presets import preset
from ctrl_ray.errors import ConfigError, CtrlRayError, InterruptedRunError

WAITS = """
import pathlib, signal, sys, time
def leave(*_):
    pathlib.Path(sys.argv[1] + ".checkpoint").touch()
    sys.exit(130)
signal.signal(signal.SIGTERM, leave)
pathlib.Path(sys.argv[1] + ".begun").touch()
print("update 1/2", flush=True)
time.sleep(60)
"""


def runs(folder: Path, *names: str) -> list[TrainConfig]:
    return [dataclasses.replace(preset("shapes"), output_dir=str(folder / "runs" / name)) for name in names]


def scripts(**by_name: str) -> Callable[[Path, bool], Sequence[str]]:
    """A Python program by the run's name; it is given the config file and whether the run goes on."""

    def command(config_file: Path, resume: bool) -> list[str]:
        return [sys.executable, "-c", by_name[config_file.stem], str(config_file), str(resume)]

    return command


def test_finished_runs_are_left_alone_and_the_others_are_trained_at_the_same_time(tmp_path: Path) -> None:
    """Each of two waits for the other to have begun; one that has a config goes on."""
    meets = """
import pathlib, sys, time
file, other = pathlib.Path(sys.argv[1]), OTHER
file.with_suffix(".begun").write_text(sys.argv[2])
while not file.with_name(other + ".begun").exists():
    time.sleep(0.01)
"""
    first, second, done = runs(tmp_path, "first", "second", "done")
    note_finished_in = Path(done.output_dir)
    note_finished_in.mkdir(parents=True)
    note_finished(note_finished_in, TrainedRun(adapter="there", seconds=1.0, whole=True))
    (tmp_path / "runs" / "second").mkdir()
    (tmp_path / "runs" / "second" / "config.json").write_text("{}")
    (tmp_path / "runs" / "first").mkdir()
    said: list[str] = []
    command = scripts(first=meets.replace("OTHER", "'second'"), second=meets.replace("OTHER", "'first'"))
    train_side_by_side([first, done, second], 2, said.append, command)
    assert said[0] == "training 2 runs, 2 at a time, one thread each"
    found = {name: json.loads((tmp_path / "runs" / name / "training.json").read_text()) for name in ("first", "second")}
    assert [found[name]["whole"] for name in found] == [True, False]
    assert found["first"]["adapter"] == str(tmp_path / "runs" / "first" / "adapter") and found["first"]["seconds"] > 0
    assert (tmp_path / "runs" / "second.begun").read_text() == "True"
    given = train_config_from_json((tmp_path / "runs" / "first.json").read_text())
    assert given == first
    train_side_by_side([first, done, second], 2, said.append, scripts())


def test_no_more_than_so_many_at_a_time(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    configs = runs(tmp_path, *names)
    for config in configs:
        Path(config.output_dir).mkdir(parents=True)
    train_side_by_side(configs, 1, pytest.fail, scripts())  # that is `trained_run`'s
    together = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1]).parent
mark = folder / (pathlib.Path(sys.argv[1]).stem + ".busy")
mark.touch()
assert len(list(folder.glob("*.busy"))) <= 2
time.sleep(0.5)
mark.unlink()
"""
    train_side_by_side(configs, 2, lambda line: None, scripts(**dict.fromkeys(names, together)))
    assert all(is_finished(Path(config.output_dir)) for config in configs)


@pytest.mark.parametrize(("status", "kind"), [(2, ConfigError), (1, CtrlRayError)])
def test_a_run_that_fails_ends_the_others_with_its_own_message(tmp_path: Path, status: int, kind: type) -> None:
    fails = f"""
import pathlib, sys, time
while not pathlib.Path(sys.argv[1]).with_name("waits.json.begun").exists():
    time.sleep(0.01)
print("error: lora.rank is 0; expected at least 1")
print("good bye")
sys.exit({status})
"""
    configs = runs(tmp_path, "waits", "fails")
    with pytest.raises(
        kind, match=r"the run fails failed: lora.rank is 0; expected at least 1 .its output: .*fails.log"
    ):
        train_side_by_side(configs, 2, lambda line: None, scripts(waits=WAITS, fails=fails))
    assert (tmp_path / "runs" / "waits.json.checkpoint").exists()
    assert not any(is_finished(Path(config.output_dir)) for config in configs)


def test_ctrl_c_leaves_a_checkpoint_of_every_run(tmp_path: Path) -> None:
    configs = runs(tmp_path, "a", "b")

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while len(list((tmp_path / "runs").glob("*.begun"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        train_side_by_side(configs, 2, lambda line: None, scripts(a=WAITS, b=WAITS))
    thread.join()
    assert len(list((tmp_path / "runs").glob("*.checkpoint"))) == 2


def test_a_run_that_was_stopped_stops_the_comparison(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        train_side_by_side(runs(tmp_path, "a"), 2, lambda line: None, scripts(a="import sys; sys.exit(130)"))


def test_shares_are_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's worker and reward actor reserve its share between them; several workers or cards are trained one by one."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr("ctrl_ray.comparison.side_by_side.local_memory_bytes", lambda: 13 * 2**30)
    config = preset("shapes")
    assert runs_at_a_time(config) == 3, "memory for three"
    share = sharing(config, 2)
    assert (share.scaling.cpus_per_worker, share.rewards.cpus_per_actor) == (1.0, 1.0)
    assert (share.scaling.num_threads, share.rewards.threads_per_actor) == (1, 1)
    assert sharing(config, 1) is config
    for changes in ({"num_workers": 2}, {"use_gpu": True}):
        scaling = dataclasses.replace(config.scaling, **changes)
        assert runs_at_a_time(dataclasses.replace(config, scaling=scaling)) == 1
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert runs_at_a_time(config) == 1
    assert train_command(Path("run.json"), True)[1:] == ["-m", "ctrl_ray.train", "--config", "run.json", "--resume"]
