"""When a pool grows and shrinks."""

from __future__ import annotations

from ctrl_ray.rewards.scaling import Scaler


def scaler() -> Scaler:
    return Scaler(1, 3, grow_after_s=5, shrink_after_s=60)


def test_a_backlog_that_lasts_adds_one_actor_at_a_time_up_to_the_most() -> None:
    pool, actors, changes = scaler(), 1, []
    for second in range(40):
        change = pool.decide(second, actors, unfinished=10)
        if change:
            changes.append((second, change))
        actors += change
    assert changes == [(5, 1), (11, 1)]  # the time starts anew with the first look after a change
    assert actors == 3


def test_a_break_in_the_backlog_starts_the_time_anew() -> None:
    pool = scaler()
    load = [5, 5, 5, 5, 1, 5, 5, 5, 5, 5]
    assert [pool.decide(second, 1, unfinished) for second, unfinished in enumerate(load)] == [0] * 10
    assert pool.decide(10, 1, 5) == 1


def test_no_second_actor_while_one_starts() -> None:
    pool = scaler()
    assert [pool.decide(second, 2, 10, starting=1) for second in range(30)] == [0] * 30
    assert [pool.decide(second, 2, 10) for second in range(30, 36)] == [0, 0, 0, 0, 0, 1]


def test_slack_that_lasts_removes_actors_down_to_the_fewest() -> None:
    pool, actors, changes = scaler(), 3, []
    for second in range(300):
        change = pool.decide(second, actors, unfinished=0)
        if change:
            changes.append(second)
        actors += change
    assert changes == [60, 121]
    assert actors == 1


def test_as_many_requests_as_actors_changes_nothing_and_neither_does_a_busy_moment_in_the_slack() -> None:
    pool = scaler()
    assert {pool.decide(second, 2, unfinished=2) for second in range(500)} == {0}
    load = [0 if second % 50 else 2 for second in range(500)]
    assert {pool.decide(500 + second, 2, unfinished) for second, unfinished in enumerate(load)} == {0}


def test_equal_bounds_are_a_fixed_pool() -> None:
    pool = Scaler(2, 2, grow_after_s=5, shrink_after_s=60)
    assert {pool.decide(second, 2, unfinished) for unfinished in (0, 9) for second in range(500)} == {0}
