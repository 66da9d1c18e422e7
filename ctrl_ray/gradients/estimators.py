"""Gradient estimators: which steps of a trajectory are swept, and with what weight on their parameter gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol


@dataclass(frozen=True)
class SweepPlan:
    """One micro-batch's sweep."""

    weights: tuple[float, ...]
    """(T,): multiplies a step's parameter gradient, never the cotangent that is passed on."""
    stop_below: int
    """The sweep runs for step indices T − 1 … stop_below."""
    pullback: Literal["policy", "reference", "score"]
    """What carries the cotangent from step to step."""


class Estimator(Protocol):
    """A way to estimate the gradient of CTRL's objective."""

    needs_cotangent: bool

    def plan(self, num_steps: int, seed: int, update: int, micro_batch: int) -> SweepPlan:
        """The same plan on every rank."""
        ...

    def cost(self, num_steps: int, guided: bool) -> Mapping[str, float]:
        """Denoiser forwards and backwards per sample, rollout included."""
        ...


class FullEstimator:
    """The exact gradient of the discretised objective: every step is swept with weight 1.

    Unbiased. Cost per sample at T steps (×2 with guidance): 3 T forwards (rollout; policy and reference in the sweep)
    and 2 T backwards.
    """

    needs_cotangent = True

    def plan(self, num_steps: int, seed: int, update: int, micro_batch: int) -> SweepPlan:
        """All steps, weight 1."""
        return SweepPlan((1.0,) * num_steps, 0, "policy")

    def cost(self, num_steps: int, guided: bool) -> Mapping[str, float]:
        """3 T forwards, 2 T backwards; twice that with guidance."""
        branches = 2 if guided else 1
        return {"forwards": 3.0 * num_steps * branches, "backwards": 2.0 * num_steps * branches}
