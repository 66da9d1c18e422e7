"""The channel without Ray: rows one way, a stop the other."""

from __future__ import annotations

from ctrl_ray.distributed.channel import MetricsChannel
from ctrl_ray.distributed.rows import Notice, Started, Stop


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
