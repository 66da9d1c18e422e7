"""An update that is shared by ranks."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

from ctrl_ray.config import EstimatorConfig
from ctrl_ray.distributed.batches import num_rounds, rank_share
from ctrl_ray.distributed.learner import Rank
from ctrl_ray.distributed.method import make_method
from ctrl_ray.exact.problems import Sampler
from ctrl_ray.exact.suite import Effort, gaussian
from tests.analytic import PlainEngine, make_learner


class _Accumulating(PlainEngine):
    """Keeps the gradient instead of using it."""

    def step(self, update: int) -> float:
        return 0.0


@functools.cache
def _update(micro_batch_size: int, num_ranks: int, group_size: int = 1) -> tuple[Tensor, float]:
    """Mean over ranks, as the engine takes it, of the gradient of an update of eight samples of ten steps, and the sum of
    their parts of the loss; groups are compared with each other (reinforce)."""
    case = dataclasses.replace(gaussian(), effort=Effort(batch_size=8, num_nodes=5))
    case = dataclasses.replace(case, problem=dataclasses.replace(case.problem, sampler=Sampler(num_steps=10)))
    learner, policy = make_learner(case, engine=_Accumulating)
    config = dataclasses.replace(
        learner.config,
        micro_batch_size_per_worker=micro_batch_size,
        group_size=group_size,
        estimator=EstimatorConfig(name="full" if group_size == 1 else "reinforce"),
    )
    loss = 0.0
    for rank in range(num_ranks):
        own = dataclasses.replace(learner, config=config, rank=Rank(rank, num_ranks, torch.device("cpu")))
        loss += make_method(config).update(own, update=3)["loss"]
    gradient = policy.pushes["first"].grad
    assert gradient is not None
    return gradient / num_ranks, loss


def _require_the_same(micro_batch_size: int, num_ranks: int, group_size: int = 1) -> None:
    (whole, loss), (shared, sum_of_losses) = _update(8, 1, group_size), _update(micro_batch_size, num_ranks, group_size)
    assert (shared - whole).norm() < 1e-5 * whole.norm()
    assert sum_of_losses == pytest.approx(loss, rel=1e-5), "padding counts for nothing"


@pytest.mark.parametrize(
    ("micro_batch_size", "num_ranks"), [(4, 1), (3, 1), (1, 1), (4, 2), (2, 3), (2, 4), (1, 5), (1, 8)]
)
def test_shares_that_do_not_divide_have_the_same_gradient(micro_batch_size: int, num_ranks: int) -> None:
    """Eight samples on 1 to 8 ranks, also where the last micro-batch is smaller (3, 3 and 2 samples), and where shares, and
    so the numbers of micro-batches, differ (3 and 5 ranks)."""
    _require_the_same(micro_batch_size, num_ranks)


@pytest.mark.parametrize(("micro_batch_size", "num_ranks"), [(4, 2), (2, 3), (4, 3), (2, 4)])
def test_groups_stay_whole_on_shares_that_do_not_divide(micro_batch_size: int, num_ranks: int) -> None:
    """Four groups of two samples, each of them the other's baseline: a cut one would have another gradient."""
    _require_the_same(micro_batch_size, num_ranks, 2)


def test_every_sample_is_somewhere_once() -> None:
    """Shares are neighbours, differ by one at most, and fit in the rounds that every rank runs."""
    for total, ranks, micro in ((64, 3, 16), (8, 5, 1), (7, 7, 2), (64, 4, 16)):
        shares = [rank_share(total, rank, ranks) for rank in range(ranks)]
        assert [i for share in shares for i in share] == list(range(total))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
        assert num_rounds(total, ranks, micro) * micro >= max(map(len, shares))
        assert (num_rounds(total, ranks, micro) - 1) * micro < max(map(len, shares))
    assert [list(rank_share(12, rank, 4, 2)) for rank in range(4)] == [[0, 1], [2, 3, 4, 5], [6, 7], [8, 9, 10, 11]]
    assert num_rounds(12, 4, 2, 2) == 2 and num_rounds(12, 4, 4, 2) == 1
    # where it divides, groups change nothing
    assert [rank_share(64, rank, 4, 8) for rank in range(4)] == [rank_share(64, rank, 4) for rank in range(4)]
