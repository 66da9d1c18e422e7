"""Whole samples of the pre-trained model, of which one an image is kept: best of N, and rejection.

Both draw plain samples, as many images at a time as they are given. The density of a path that was kept is not known.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ctrl_ray.baselines.noise import repeated_tries
from ctrl_ray.baselines.sampler import Baseline, Call
from ctrl_ray.baselines.tilt import log_tilt
from ctrl_ray.gradients.rollout import Trajectory, rollout


@dataclass(frozen=True, kw_only=True)
class BestOfN(Baseline):
    """Of N samples the one with the largest ℓ. Not the target's law at any N; as N grows, only its mode."""

    num_particles: int = 4
    """N."""
    method: ClassVar[str] = "best_of_n"

    def draw(self, call: Call) -> Trajectory:
        """See `Baseline`."""
        rows = range(len(call.inputs))
        best, largest = _one_try(call, self.exponents, 0, rows)
        for number in range(1, self.num_particles):
            latents, tilts = _one_try(call, self.exponents, number, rows)
            better = tilts > largest
            best[:, better] = latents[:, better]
            largest = torch.maximum(tilts, largest)
        return Trajectory(best, call.inputs)


@dataclass(frozen=True, kw_only=True)
class Rejection(Baseline):
    """The first sample that is accepted with probability e^ℓ = Π_c p̂_c^λ_c (von Neumann 1951). Exact, at 1 / Z samples an image
    on average."""

    max_tries: int = 256
    """Of an image that is accepted none of so many times, one of the tries is taken in proportion to e^ℓ, with a warning."""
    method: ClassVar[str] = "rejection"

    def draw(self, call: Call) -> Trajectory:
        """See `Baseline`."""
        pending, kept = list(range(len(call.inputs))), None
        totals = torch.full((len(call.inputs),), -torch.inf, dtype=torch.float64)
        for number in range(self.max_tries):
            latents, tilts = _one_try(call, self.exponents, number, pending)
            kept = torch.empty_like(latents) if kept is None else kept
            still = []
            for column, image in enumerate(pending):
                tilt = float(tilts[column])
                accepted = call.noise.uniform(image, number, "acceptance") < torch.tensor(tilt).exp()
                totals[image] = torch.logaddexp(totals[image], torch.tensor(tilt, dtype=torch.float64))
                # one of the tries so far in proportion to e^ℓ (a reservoir), for an image that none is accepted of
                share = (tilt - totals[image]).exp()
                if accepted or number == 0 or call.noise.uniform(image, number, "reservoir") < share:
                    kept[:, image] = latents[:, column]
                if not accepted:
                    still.append(image)
            pending = still
            if not pending:
                break
        if pending:
            warnings.warn(
                f"rejection accepted none of {self.max_tries} tries for {len(pending)} of {len(call.inputs)} images; each is "
                "one of its tries, drawn in proportion to p(y|x,c)^exponent: not an exact law. Give --method.max-tries "
                "more, or a smaller --exponent",
                UserWarning,
                stacklevel=2,
            )
        assert kept is not None
        return Trajectory(kept, call.inputs)


def _one_try(call: Call, exponents: tuple[float, ...], number: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(latents (T + 1, R, ...), ℓ (R,)) of one more sample of some of the images."""
    part = call.inputs.select(rows)
    noise = repeated_tries(call.noise, number, rows, call.kernel.num_steps)
    path = rollout(call.policy, call.kernel, part, noise, reference=True, on_step=call.on_step)
    return path.latents, log_tilt(call.rewards, path.clean_latents, part, exponents)
