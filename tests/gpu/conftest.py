"""What every GPU test has: the device, exact float32, and a place for its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.gpu.reporter import record
from tests.gpu.support import device_under_test, set_tf32


@pytest.fixture
def device() -> torch.device:
    """The first card; the CPU where the environment says so (see `tests.gpu.support.ON`)."""
    return device_under_test()


@pytest.fixture
def card(device: torch.device) -> torch.device:
    """The first card, for what only a card can show."""
    if device.type != "cuda":
        pytest.skip("only a card can show this")
    return device


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`measured(kl=0.1, …)` hands figures to the session's JSON, under the test's name."""

    def hand_over(**figures: Any) -> None:
        record(request.node.nodeid, **figures)

    return hand_over


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """What a card computes in float32 is compared with a CPU."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_tf32(False)
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
