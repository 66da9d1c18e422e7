"""Runs of a comparison: their settings, once each, and the CPU time below a process."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ctrl_ray.comparison.methods import METHODS
from ctrl_ray.comparison.training import TrainedRun, cpu_seconds_below, held_out_config, run_config, trained_run
from ctrl_ray.config import TrainConfig
from ctrl_ray.config.presets import preset
from ctrl_ray.offline.prompts import training_prompts


class Train:
    """In place of `ctrl_ray.train.fit`."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, bool]] = []

    def __call__(self, config: TrainConfig, resume: bool) -> Path:
        self.asked.append((config.seed, resume))
        return Path(config.output_dir) / "adapter"


def run(folder: Path, seed: int = 0) -> TrainConfig:
    folder.mkdir(exist_ok=True)
    training = METHODS["ctrl"].training
    assert training is not None
    return run_config(preset("shapes"), training, folder, seed)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    train = Train()
    first = trained_run(run(tmp_path, 3), train)
    assert trained_run(run(tmp_path, 3), train) == first
    assert train.asked == [(3, False)]
    assert first.adapter == str(tmp_path / "adapter") and first.whole


def test_a_run_that_was_stopped_goes_on_and_its_cost_is_a_part(tmp_path: Path) -> None:
    train = Train()
    (tmp_path / "config.json").write_text("{}")
    assert not trained_run(run(tmp_path), train).whole
    assert train.asked == [(0, True)]


def test_a_run_that_fails_is_not_finished(tmp_path: Path) -> None:
    def fails(config: TrainConfig, resume: bool) -> Path:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained_run(run(tmp_path), fails)
    assert not list(tmp_path.iterdir())


def test_what_a_run_cost_is_read_back(tmp_path: Path) -> None:
    known = {"adapter": "/a", "seconds": 4.0, "cpu_seconds": 7.5, "whole": True}
    (tmp_path / "training.json").write_text(json.dumps(known))
    assert trained_run(run(tmp_path), Train()) == TrainedRun(**known)  # type: ignore[arg-type]


def test_the_held_out_run_is_the_presets_on_the_other_prompts(tmp_path: Path) -> None:
    config = held_out_config(preset("shapes"), tmp_path / "runs" / "held", ["a red circle", "a blue square"])
    assert training_prompts(config) == ("a red circle", "a blue square")
    assert config.output_dir == str(tmp_path / "runs" / "held")


def process(proc: Path, pid: int, parent: int, *ticks: int) -> None:
    """/proc/PID/stat with a name that holds what a name may hold."""
    before = ["S", str(parent), *["0"] * 9]
    (proc / str(pid)).mkdir()
    (proc / str(pid) / "stat").write_text(f"{pid} (a ) b) {' '.join([*before, *map(str, ticks), '20', '0'])}")


def test_cpu_time_is_of_the_process_and_all_below_it(tmp_path: Path) -> None:
    """A grandchild counts, what children that ended have used does, a stranger does not."""
    process(tmp_path, 10, 1, 100, 50, 7, 3)
    process(tmp_path, 11, 10, 20, 0, 0, 0)
    process(tmp_path, 12, 11, 5, 5, 0, 0)
    process(tmp_path, 13, 1, 1000, 0, 0, 0)
    (tmp_path / "99").mkdir()  # it has just ended
    assert cpu_seconds_below(10, tmp_path) * os.sysconf("SC_CLK_TCK") == pytest.approx(160 + 20 + 10)


def test_this_process_has_used_some() -> None:
    """The real /proc, in seconds."""
    times = os.times()
    assert cpu_seconds_below(os.getpid()) >= times.user + times.system - 0.1 > 0
