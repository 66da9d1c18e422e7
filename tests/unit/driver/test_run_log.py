"""What the driver makes of the workers' rows: lines for a person, metrics.jsonl, and what a restart drops."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctrl_ray.config import TrainConfig
from ctrl_ray.distributed.rows import (
    EvaluationDone,
    Notice,
    SamplesDrawn,
    Started,
    Stop,
    Stopped,
    Stopping,
    UpdateDone,
)
from ctrl_ray.driver.run_log import RunLog
from ctrl_ray.reporting.tracking import RunTracker, read_metrics
from ctrl_ray.runs.folder import RunFolder

CONFIG = TrainConfig(num_updates=4, checkpoint_every_updates=2, tracker="none")


@pytest.fixture(autouse=True)
def in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain lines, also where these tests run on a terminal."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the tracker was given to show in Aim, which is off here."""
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(RunTracker, "log_images", lambda tracker, *arguments: calls.append(arguments))
    return calls


def _log(folder: Path, *, resume: bool = False) -> RunLog:
    return RunLog(CONFIG, RunFolder(str(folder)), resume=resume)


def _updated(update: int, reward: float = -1.0) -> UpdateDone:
    return UpdateDone(update, {"reward": reward, "kl": 0.5, "samples_per_s": 8.0})


def _rows(folder: Path) -> list[tuple[str, int]]:
    return [(row["kind"], row["update"]) for row in read_metrics(folder)]


def test_a_denoising_loss_is_shown_in_the_place_of_reward_and_kl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = _log(tmp_path)
    log(Started(0))
    for update in range(1, 5):
        log(UpdateDone(update, {"denoising_loss": 0.25, "samples_per_s": 8.0}))
    log.close()
    assert "update 4/4 · denoising loss 0.2500 · 8.0 samples/s · " in capsys.readouterr().out
    assert read_metrics(tmp_path)[-1]["denoising_loss"] == 0.25


def test_rows_become_metrics_and_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shown: list[tuple[Any, ...]]
) -> None:
    log = _log(tmp_path)
    images, captions = [np.zeros((2, 2, 3), np.uint8)], ["size: small"]
    for row in (
        Notice("waiting for machines"),  # nothing has started
        Started(0),
        EvaluationDone(0, {"kl": 0.0, "accuracy": 0.25}),
        SamplesDrawn(0, images, captions),
        _updated(1),
        EvaluationDone(1, {"kl": 1.5}),  # no control has an oracle
        EvaluationDone(1, {"kl": 1.5, "gap": 2.125, "gap_standard_error": 0.1875}),
        _updated(2, reward=-0.5),
        Stopping("SIGINT"),
        Notice("a line"),
        Stopped(2, Stop("asked", "SIGINT received")),
    ):
        log(row)
    log.close()
    assert _rows(tmp_path) == [("evaluation", 0), ("update", 1), ("evaluation", 1), ("evaluation", 1), ("update", 2)]
    assert [row.get("reward") for row in read_metrics(tmp_path)] == [None, -1.0, None, None, -0.5]
    assert shown == [(0, "during", images, captions)]
    assert capsys.readouterr().out.splitlines() == [
        "waiting for machines",
        "evaluation after update 0: accuracy 0.250, KL 0.00 nats",
        "evaluation after update 1: KL 1.50 nats",
        "evaluation after update 1: KL 1.50 nats, 2.12 ± 0.19 nats from the target",
        "SIGINT: leaving a checkpoint after this update (once more to stop at once)",
        "a line",
        "stopped after update 2: SIGINT received",
    ]


def test_every_kl_has_its_floor_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the workers have measured it; in every row of an evaluation."""
    log = _log(tmp_path)
    for row in (
        Started(0, 0.00616),
        EvaluationDone(0, {"kl": 0.0}),
        *map(_updated, (1, 2, 3, 4)),
        EvaluationDone(4, {"kl": 3.0}),
        Stopped(4, Stop("target_kl", "KL 3.00 nats exceeds target_kl 2")),
    ):
        log(row)
    log.close()
    rows = read_metrics(tmp_path)
    assert [row["kl_noise_floor"] for row in rows if row["kind"] == "evaluation"] == [0.00616, 0.00616]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "evaluation after update 0: KL 0.00 nats (floor 0.0062)"
    assert lines[1].startswith("update 4/4 · reward -1.000 · KL 0.50 nats (floor 0.0062) · 8.0 samples/s")
    assert lines[3] == "stopped after update 4: KL 3.00 nats exceeds target_kl 2 (floor 0.0062)"


def test_a_restart_drops_the_updates_that_are_done_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = _log(tmp_path)
    for row in (Started(0), _updated(1), _updated(2), _updated(3, reward=-3.0), Started(2), _updated(3, reward=-2.0)):
        log(row)
    log(_updated(4))
    log.close()
    assert [(row["update"], row["reward"]) for row in read_metrics(tmp_path)] == [(1, -1), (2, -1), (3, -2), (4, -1)]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resumed after update 2"
    assert lines[1].startswith("update 4/4 · reward -1.000 · KL 0.50 nats · 8.0 samples/s · 0 s left")


def test_an_evaluation_that_a_resumed_run_makes_up_for_waits_for_its_workers(
    tmp_path: Path, shown: list[tuple[Any, ...]]
) -> None:
    """The tracker is opened, and later updates are dropped, when the workers say where they go on."""
    before = _log(tmp_path)
    for row in (Started(0), _updated(1), _updated(2), _updated(3)):
        before(row)
    before.close()
    log = _log(tmp_path, resume=True)
    log(EvaluationDone(2, {"kl": 1.0}))
    log(SamplesDrawn(2, [], []))
    assert _rows(tmp_path) == [("update", 1), ("update", 2), ("update", 3)] and shown == []
    log(Started(2))
    log.close()
    assert _rows(tmp_path) == [("update", 1), ("update", 2), ("evaluation", 2)]
    assert shown == [(2, "during", [], [])]


def test_rows_that_a_killed_driver_did_not_write_come_with_the_checkpoint(tmp_path: Path) -> None:
    """Each once, with its time; what was written stays as it is, and later updates are done again."""
    before = _log(tmp_path)
    for row in (Started(0), EvaluationDone(0, {"kl": 0.0}, time=5.0), _updated(1, reward=-1.5)):
        before(row)
    before.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "update", "upd')  # torn
    brought = [
        EvaluationDone(0, {"kl": 9.0}, time=9.0),
        UpdateDone(1, {"reward": 9.0}, time=9.0),
        UpdateDone(2, {"reward": -0.25, "kl": 0.125}, time=7.0),
        EvaluationDone(2, {"kl": 0.5, "accuracy": 0.75}, time=8.0),
    ]
    log = _log(tmp_path, resume=True)
    for row in (Started(2, 0.00616, brought), _updated(3)):
        log(row)
    log.close()
    rows = read_metrics(tmp_path)
    assert rows[0] == {"kind": "evaluation", "update": 0, "time": 5.0, "kl": 0.0}
    assert (rows[1]["update"], rows[1]["reward"]) == (1, -1.5)
    assert rows[2:4] == [
        {"kind": "update", "update": 2, "time": 7.0, "reward": -0.25, "kl": 0.125},
        {"kind": "evaluation", "update": 2, "time": 8.0, "kl": 0.5, "accuracy": 0.75, "kl_noise_floor": 0.00616},
    ]
    assert [(row["kind"], row["update"]) for row in rows[4:]] == [("update", 3)]


def test_a_start_from_the_very_beginning_drops_the_first_evaluation_too(tmp_path: Path) -> None:
    """It is made again, as everything is."""
    before = _log(tmp_path)
    for row in (Started(0), EvaluationDone(0, {"kl": 0.0}), _updated(1)):
        before(row)
    before.close()
    log = _log(tmp_path, resume=True)
    for row in (Started(0, None, [EvaluationDone(0, {"kl": 0.0})]), EvaluationDone(0, {"kl": 0.0}), _updated(1)):
        log(row)
    log.close()
    assert _rows(tmp_path) == [("evaluation", 0), ("update", 1)]


def test_a_new_run_writes_no_row_twice(tmp_path: Path) -> None:
    """After a lost worker the rows of the checkpoint are there already."""
    log = _log(tmp_path)
    for row in (Started(0), _updated(1), _updated(2), _updated(3), Started(2, None, [_updated(1), _updated(2)])):
        log(row)
    log.close()
    assert _rows(tmp_path) == [("update", 1), ("update", 2)]
