"""Whole samples of the pre-trained model, of which one an image is kept: best of N, and rejection.

Both draw plain samples, as many images at a time as they are given. The density of a path that was kept is not known.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl_ray.baselines.noise import ImageNoise, repeated_tries
from ctrl_ray.baselines.prediction import require_reference
from ctrl_ray.baselines.tilt import log_tilt, require_rewards
from ctrl_ray.diffusion.steps import DenoisingKernel
from ctrl_ray.gradients.rollout import NoiseSource, Trajectory, rollout
from ctrl_ray.policy.protocol import Inputs, Policy
from ctrl_ray.rewards.protocol import Rewards


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """A `Sampler`: of N samples the one with the largest ℓ. Not the target's law at any N; as N grows, only its mode."""

    exponents: tuple[float, ...]
    """λ of each control, in the order of the label columns."""
    num_particles: int = 4
    """N."""

    @torch.no_grad()
    def __call__(
        self,
        policy: Policy,
        kernel: DenoisingKernel,
        inputs: Inputs,
        noise: NoiseSource,
        rewards: Rewards | None = None,
        *,
        reference: bool = True,
        with_kl: bool = False,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Trajectory:
        """See `Sampler`. ConfigError for a policy in place of the pre-trained model, and without rewards."""
        require_reference(kernel, "best_of_n", reference=reference)
        rewards = require_rewards(rewards, "best_of_n", gradient=False)
        draw = _Tries(policy, kernel, inputs, ImageNoise(noise), rewards, self.exponents, on_step)
        rows = range(len(inputs))
        best, largest = draw(0, rows)
        for number in range(1, self.num_particles):
            latents, tilts = draw(number, rows)
            better = tilts > largest
            best[:, better] = latents[:, better]
            largest = torch.maximum(tilts, largest)
        return Trajectory(best, inputs)


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A `Sampler`: the first sample that is accepted with probability e^ℓ = Π_c p̂_c^λ_c (von Neumann 1951). Exact, at 1 / Z
    samples an image on average."""

    exponents: tuple[float, ...]
    """λ of each control, in the order of the label columns."""
    max_tries: int = 256
    """Of an image that is accepted none of so many times, one of the tries is taken in proportion to e^ℓ, with a warning."""

    @torch.no_grad()
    def __call__(
        self,
        policy: Policy,
        kernel: DenoisingKernel,
        inputs: Inputs,
        noise: NoiseSource,
        rewards: Rewards | None = None,
        *,
        reference: bool = True,
        with_kl: bool = False,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Trajectory:
        """See `Sampler`. ConfigError for a policy in place of the pre-trained model, and without rewards."""
        require_reference(kernel, "rejection", reference=reference)
        rewards = require_rewards(rewards, "rejection", gradient=False)
        images = ImageNoise(noise)
        draw = _Tries(policy, kernel, inputs, images, rewards, self.exponents, on_step)
        pending, kept = list(range(len(inputs))), None
        totals = torch.full((len(inputs),), -torch.inf, dtype=torch.float64)
        for number in range(self.max_tries):
            latents, tilts = draw(number, pending)
            kept = torch.empty_like(latents) if kept is None else kept
            still = []
            for column, image in enumerate(pending):
                tilt = float(tilts[column])
                accepted = images.uniform(image, number, "acceptance") < torch.tensor(tilt).exp()
                totals[image] = torch.logaddexp(totals[image], torch.tensor(tilt, dtype=torch.float64))
                # one of the tries so far in proportion to e^ℓ (a reservoir), for an image that none is accepted of
                share = (tilt - totals[image]).exp()
                if accepted or number == 0 or images.uniform(image, number, "reservoir") < share:
                    kept[:, image] = latents[:, column]
                if not accepted:
                    still.append(image)
            pending = still
            if not pending:
                break
        if pending:
            warnings.warn(
                f"rejection accepted none of {self.max_tries} tries for {len(pending)} of {len(inputs)} images; each is one of "
                "its tries, drawn in proportion to p(y|x,c)^exponent, so their law is not exact: give --method.max-tries more, "
                "or a smaller --exponent",
                UserWarning,
                stacklevel=2,
            )
        assert kept is not None
        return Trajectory(kept, inputs)


@dataclass(frozen=True)
class _Tries:
    policy: Policy
    kernel: DenoisingKernel
    inputs: Inputs
    noise: ImageNoise
    rewards: Rewards
    exponents: tuple[float, ...]
    on_step: Callable[[int, Tensor], None] | None

    def __call__(self, number: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(latents (T + 1, R, ...), ℓ (R,)) of one more sample of some of the images."""
        part = self.inputs.select(rows)
        noise = repeated_tries(self.noise, number, rows, self.kernel.num_steps)
        path = rollout(self.policy, self.kernel, part, noise, reference=True, on_step=self.on_step)
        return path.latents, log_tilt(self.rewards, path.clean_latents, part, self.exponents)
