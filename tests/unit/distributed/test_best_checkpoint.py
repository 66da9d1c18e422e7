"""What a training run hands back: the best checkpoint, how far it came, why it ended."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ctrl_ray.distributed.launch import TrainingResult, _Follower, _trained
from ctrl_ray.distributed.rows import Notice, Row, Started, Stop, Stopped, UpdateDone
from ctrl_ray.distributed.scores import OVER_TARGET_KL, UNSCORED
from ctrl_ray.errors import RunFolderError


def _result(*kept: tuple[str, float, int], rows: tuple[Row, ...] = ()) -> TrainingResult:
    """Of a run that keeps these checkpoints: (name, score, updates done)."""
    follower = _Follower(lambda row: None)
    for row in rows:
        follower(row)
    checkpoints = [(name, {"score": score, "updates_done": updates}) for name, score, updates in kept]
    result: Any = SimpleNamespace(best_checkpoints=checkpoints)
    return _trained(result, follower)


def test_the_best_evaluation_wins_wherever_it_was() -> None:
    trained = _result(("a", -2.0, 3), ("b", -1.0, 6), ("c", -1.5, 9))
    assert (trained.best, trained.best_metrics["score"], trained.updates_done) == ("b", -1.0, 9)


def test_of_equal_scores_the_later_one_wins() -> None:
    """As where none was evaluated: the latest is the most trained one."""
    assert _result(("a", UNSCORED, 3), ("b", UNSCORED, 9), ("c", UNSCORED, 6)).best == "b"
    assert _result(("a", -1.0, 6), ("b", -1.0, 3)).best == "a"


def test_any_evaluation_within_target_kl_beats_none_and_none_beats_one_beyond() -> None:
    assert _result(("none", UNSCORED, 9), ("poor", -5000.0, 3)).best == "poor"
    assert _result(("beyond", OVER_TARGET_KL, 9), ("none", UNSCORED, 3)).best == "none"
    assert _result(("beyond", OVER_TARGET_KL, 9)).best == "beyond", "better than nothing"


def test_updates_count_where_no_checkpoint_was_due() -> None:
    """And the workers' last words say why the run ended; a run that goes on from the last checkpoint tells no update."""
    stop = Stop("target_kl", "KL 3.00 nats exceeds target_kl 2")
    trained = _result(("a", -1.0, 3), rows=(Started(0), UpdateDone(3, {}), UpdateDone(4, {}), Stopped(4, stop)))
    assert (trained.updates_done, trained.stopped) == (4, stop)
    trained = _result(("a", -1.0, 6), rows=(Started(6), Notice("nothing is left to do")))
    assert (trained.updates_done, trained.stopped) == (6, None)


def test_the_noise_floor_is_the_workers() -> None:
    """Also of a run that goes on: they have it from the checkpoint."""
    assert _result(("a", -1.0, 6), rows=(Started(0, 0.5), Started(6, 0.25))).kl_noise_floor == 0.25
    assert _result(("a", -1.0, 6)).kl_noise_floor is None


def test_the_follower_hides_no_row() -> None:
    seen: list[Row] = []
    follower = _Follower(seen.append)
    rows: tuple[Row, ...] = (
        Started(0),
        UpdateDone(1, {}),
        Notice("a line"),
        Stopped(1, Stop("asked", "SIGINT received")),
    )
    for row in rows:
        follower(row)
    assert tuple(seen) == rows


@pytest.mark.parametrize("kept", [[], None])
def test_a_run_without_a_checkpoint_says_what_to_do(kept: list[Any] | None) -> None:
    result: Any = SimpleNamespace(best_checkpoints=kept)
    with pytest.raises(
        RunFolderError, match=r"left no checkpoint: it was stopped before its first update ended; run it"
    ):
        _trained(result, _Follower(lambda row: None))
