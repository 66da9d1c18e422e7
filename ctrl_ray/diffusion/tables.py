"""A kernel's numbers as scalar tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class StepTables:
    """A scalar for every step, made once for each type and device: making one at every step would wait for the GPU."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, torch.dtype, str], tuple[Tensor, ...]] = {}

    def __call__(
        self, name: str, values: Sequence[float], dtype: torch.dtype, device: torch.device | str
    ) -> tuple[Tensor, ...]:
        """The values that go by this name, which are always the same."""
        key = name, dtype, str(device)
        if key not in self._made:
            self._made[key] = tuple(torch.tensor(value, dtype=dtype, device=device) for value in values)
        return self._made[key]
