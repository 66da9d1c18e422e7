"""The fitting's learning rates."""

import pytest
import torch

from ctrl_ray.classifiers.worker import one_cycle, tells_epoch


def rates(num_updates: int) -> list[float]:
    """Learning rate of every update, peak 1."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])
    schedule = one_cycle(optimizer, 1.0, num_updates)
    used = []
    for _ in range(num_updates):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return used


@pytest.mark.parametrize("num_updates", range(1, 12))
def test_short_runs_have_a_schedule(num_updates: int) -> None:
    """Three updates used to divide by zero; no update may have a rate outside (0, peak]."""
    assert all(0 < rate <= 1 for rate in rates(num_updates))


def test_peak_after_a_quarter() -> None:
    used = rates(199)
    assert max(used) == pytest.approx(1, abs=1e-6)
    assert used.index(max(used)) == 49  # 0.25 x 200 - 1
    assert used[0] == pytest.approx(1 / 25, rel=1e-3)
    assert used[-1] < 1e-3


def test_a_fit_of_many_epochs_tells_of_about_fifty_and_the_last() -> None:
    assert [epoch for epoch in range(1, 13) if tells_epoch(epoch, 12)] == list(range(1, 13))
    told = [epoch for epoch in range(1, 304) if tells_epoch(epoch, 303)]
    assert 50 <= len(told) <= 52 and told[-1] == 303
