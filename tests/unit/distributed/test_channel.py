"""The channel without Ray: rows one way, a stop the other."""

from __future__ import annotations

import time

import pytest

from ctrl_ray.distributed.channel import MetricsChannel
from ctrl_ray.distributed.rows import EvaluationDone, Notice, Started, Stop, UpdateDone


def test_rows_come_in_order_and_once() -> None:
    channel = MetricsChannel()
    assert channel.put(Started(0)) is None and channel.put(Notice("a line")) is None
    assert channel.drain() == [Started(0), Notice("a line")]
    assert channel.drain() == []


def test_a_persons_wish_to_stop_counts_before_target_kl() -> None:
    """train.fit goes on to the final evaluation after target_kl, and must not where it was interrupted."""
    kl, asked = Stop("target_kl", "KL is too large"), Stop("asked", "SIGINT received")
    for order in ((kl, asked), (asked, kl)):
        channel = MetricsChannel()
        for stop in order:
            channel.request_stop(stop)
        assert channel.put(Started(0)) == asked


def test_the_first_failure_counts() -> None:
    channel = MetricsChannel()
    assert channel.failure() is None
    first = ValueError("first")
    channel.fail(first)
    channel.fail(ValueError("second"))
    assert channel.failure() is first


def test_rows_of_metrics_are_kept_for_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their time; a restart forgets the updates that are done again, and keeps an evaluation beside training."""
    monkeypatch.setattr(time, "time", iter(range(10, 20)).__next__)
    channel = MetricsChannel()
    for row in (Started(0), Notice("a line"), UpdateDone(1, {"kl": 0.5}), UpdateDone(2, {}), UpdateDone(3, {})):
        channel.put(row)
    assert [(row.update, row.time) for row in channel.history()] == [(1, 10), (2, 11), (3, 12)]
    assert channel.drain()[2].time == 10
    channel.put(EvaluationDone(2, {"kl": 0.25}))
    channel.put(Started(2, None, [UpdateDone(1, {"kl": 0.5}, time=10), UpdateDone(2, {}, time=11)]))
    channel.put(UpdateDone(3, {"kl": 0.75}))
    assert channel.history() == [
        UpdateDone(1, {"kl": 0.5}),
        UpdateDone(2, {}),
        EvaluationDone(2, {"kl": 0.25}),
        UpdateDone(3, {"kl": 0.75}),
    ]
    assert [row.time for row in channel.history()] == [10, 11, 13, 14]
