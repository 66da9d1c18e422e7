"""Particle filters on the denoising chain: SMC, TDS and FK steering are one filter with other proposals and potentials.

N particles of each image, never across images. log w grows by log(reference / proposal) of every step and by the step's log
potential, and the last potential makes the product of them all e^ℓ(x_0), so that the last target is p_pre(x|c) e^ℓ(x).
So E[Ẑ] = Z at any N, Ẑ = Π (mean weights before each resampling) (Del Moral 2004), and a particle that is drawn in proportion
to w at the end has the target's law as N grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ctrl_ray.baselines.dps import dps_mean
from ctrl_ray.baselines.noise import ImageNoise, ParticleNoise
from ctrl_ray.baselines.prediction import guides, predict, require_reference
from ctrl_ray.baselines.tilt import log_tilt, log_tilt_and_gradient, require_rewards
from ctrl_ray.diffusion.steps import DenoisingKernel, GaussianStep, gaussian_sample, step_log_ratio
from ctrl_ray.gradients.rollout import NoiseSource, Trajectory
from ctrl_ray.policy.protocol import Inputs, Policy
from ctrl_ray.rewards.protocol import Rewards

RESAMPLE_BELOW = 0.5
"""Particles are resampled when their effective sample size is below this share of N."""
PotentialKind = Literal["difference", "max", "add"]


class Particles(NamedTuple):
    """What a filter ends with."""

    latents: Tensor
    """(T + 1, B, N, ...): the path that each particle came along."""
    log_weights: Tensor
    """(B, N) float64."""
    log_z: Tensor
    """(B,) float64: log Ẑ; E[Ẑ] = Z."""


@dataclass(frozen=True, kw_only=True)
class ParticleFilter:
    """A `Sampler`; subclasses say the proposal and when the reward is asked."""

    exponents: tuple[float, ...]
    """λ of each control, in the order of the label columns."""
    num_particles: int = 4
    """N."""
    method: ClassVar[str]
    potential: PotentialKind = "difference"
    """G_k of what is asked at step k: 'difference': e^(ℓ_k − ℓ before), 'max': e^(largest ℓ so far), 'add': e^(Σ ℓ so far). The
    last one divides out those before, so that all have the same target."""

    @property
    def rows_per_image(self) -> int:
        """Latents that are held for each image."""
        return self.num_particles

    @property
    def twist(self) -> float:
        """Scale of reconstruction guidance in the proposal; 0: the pre-trained model's steps."""
        return 0.0

    def asks(self, step_index: int) -> bool:
        """Whether the reward is asked for x̂_0 before this step."""
        return True

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
        """See `Sampler`: of each image one particle, drawn in proportion to w. Its path has no density that is known, so no KL.

        Raises ConfigError for a policy in place of the pre-trained model, for rewards that are missing or without a gradient
        that the proposal needs, and where no step has noise.
        """
        require_reference(kernel, self.method, reference=reference)
        rewards = require_rewards(rewards, self.method, gradient=self.twist > 0)
        own = ImageNoise(noise)
        found = self.filter(policy, kernel, inputs, own, rewards, on_step=on_step)
        chosen = drawn(found.log_weights, own, kernel.num_steps, "choice")
        return Trajectory(found.latents[:, range(len(inputs)), chosen], inputs)

    def filter(
        self,
        policy: Policy,
        kernel: DenoisingKernel,
        inputs: Inputs,
        noise: ImageNoise,
        rewards: Rewards,
        *,
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Particles:
        """The particles of B images before one of each is drawn."""
        count, total = self.num_particles, len(inputs) * self.num_particles
        rows = inputs.select([row for row in range(len(inputs)) for _ in range(count)])
        draw = ParticleNoise(noise, count)
        latents = draw(0)
        log_weights = torch.zeros(len(inputs), count, dtype=torch.float64, device=latents.device)
        potentials = _Potentials(self.potential, torch.zeros_like(log_weights))
        log_z = log_weights.new_zeros(len(inputs))
        kept, parents = [latents], []
        for step_index in range(kernel.num_steps):
            ref, proposal, tilts = self._propose(policy, kernel, step_index, latents, rows, rewards)
            if tilts is not None:
                log_weights = log_weights + potentials.log_increment(tilts.view(-1, count))
            chosen = torch.arange(total, device=latents.device)
            if self.asks(step_index) and kernel.std(step_index) > 0:
                chosen, gained = _resampled(log_weights, noise, step_index)
                log_z = log_z + gained.sum_of_logs
                log_weights = gained.log_weights
                ref, proposal = ref.select(chosen), None if proposal is None else proposal.select(chosen)
                potentials.select(chosen)
            parents.append(chosen)
            if kernel.std(step_index) > 0:
                z = draw(step_index + 1)
                latents = gaussian_sample(proposal or ref, z)
                if proposal is not None:
                    log_weights = log_weights - step_log_ratio(proposal, ref, z).view(-1, count)
            else:
                latents = ref.mean
            kept.append(latents)
            if on_step is not None:
                on_step(step_index, latents)
        last = log_tilt(rewards, latents, rows, self.exponents).view(-1, count)
        log_weights = log_weights + last - potentials.product
        log_z = log_z + log_weights.logsumexp(1) - math.log(count)
        return Particles(_traced(kept, parents, (len(inputs), count)), log_weights, log_z)

    def _propose(
        self,
        policy: Policy,
        kernel: DenoisingKernel,
        step_index: int,
        latents: Tensor,
        inputs: Inputs,
        rewards: Rewards,
    ) -> tuple[GaussianStep, GaussianStep | None, Tensor | None]:
        """(the pre-trained model's step, another proposal if there is one, ℓ(x̂_0) where it is asked), of all particles."""
        twisted = self.twist > 0 and guides(kernel, step_index)
        prediction = predict(policy, kernel, step_index, latents, inputs, with_graph=twisted)
        ref = prediction.step
        if twisted:
            tilts, gradient = log_tilt_and_gradient(rewards, prediction.denoised.x_0, inputs, self.exponents)
            mean = dps_mean(prediction, prediction.pull_back(gradient), self.twist)
            return ref, GaussianStep(mean, ref.std), tilts
        if not self.asks(step_index):
            return ref, None, None
        return ref, None, log_tilt(rewards, prediction.detached().x_0, inputs, self.exponents)


def drawn(log_weights: Tensor, noise: ImageNoise, step_index: int, purpose: str) -> list[int]:
    """Of each image one number in proportion to its weights (B, N)."""
    shares, last = log_weights.softmax(1).cumsum(1).cpu(), log_weights.shape[1] - 1
    uniform = [noise.uniform(image, step_index, purpose) for image in range(len(shares))]
    return [min(int((row <= u).sum()), last) for row, u in zip(shares, uniform, strict=True)]


class _Resampling(NamedTuple):
    sum_of_logs: Tensor
    """(B,): log mean w of the images that were resampled, 0 of the others."""
    log_weights: Tensor
    """(B, N): 0 of those, as before of the others."""


def _resampled(log_weights: Tensor, noise: ImageNoise, step_index: int) -> tuple[Tensor, _Resampling]:
    """(rows of the parents (B · N,), what becomes of the weights): systematic resampling (Kitagawa 1996) of each image whose
    effective sample size is low."""
    num_images, count = log_weights.shape
    sizes = (2 * log_weights.logsumexp(1) - (2 * log_weights).logsumexp(1)).exp()
    low = sizes < RESAMPLE_BELOW * count
    parents = torch.arange(num_images * count, device=log_weights.device).view(num_images, count).clone()
    cumulative = log_weights.softmax(1).cumsum(1)
    for image in low.nonzero()[:, 0].tolist():
        start = noise.uniform(image, step_index, "resampling")
        points = (torch.arange(count, dtype=torch.float64, device=log_weights.device) + start) / count
        parents[image] = image * count + torch.searchsorted(cumulative[image], points, right=True).clamp(max=count - 1)
    gained = torch.where(low, log_weights.logsumexp(1) - math.log(count), 0.0)
    kept = torch.where(low[:, None], 0.0, log_weights)
    return parents.view(-1), _Resampling(gained, kept)


class _Potentials:
    """Of each particle the log of the product of its potentials so far, and what the next one needs."""

    def __init__(self, kind: PotentialKind, zeros: Tensor) -> None:
        self.kind, self.product = kind, zeros
        self._seen = torch.full_like(zeros, -math.inf) if kind == "max" else zeros

    def log_increment(self, tilts: Tensor) -> Tensor:
        """log G of particles with these ℓ, (B, N)."""
        if self.kind == "difference":
            increment = tilts - self.product
        else:
            self._seen = torch.maximum(self._seen, tilts) if self.kind == "max" else self._seen + tilts
            increment = self._seen
        self.product = self.product + increment
        return increment

    def select(self, rows: Tensor) -> None:
        """The particles are those of these rows now."""
        self.product, self._seen = (values.view(-1)[rows].view(values.shape) for values in (self.product, self._seen))


def _traced(kept: list[Tensor], parents: list[Tensor], shape: tuple[int, int]) -> Tensor:
    """(T + 1, B, N, ...) paths of the last particles. kept: latents after each step, and the first; parents: by step, which
    rows before it the rows after it came from."""
    rows = torch.arange(len(kept[-1]), device=kept[-1].device)
    path = [kept[-1]]
    for latents, of_step in zip(reversed(kept[:-1]), reversed(parents), strict=True):
        rows = of_step[rows]
        path.append(latents[rows])
    return torch.stack(path[::-1]).unflatten(1, shape)
