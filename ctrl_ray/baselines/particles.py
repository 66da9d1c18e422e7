"""Particle filters on the denoising chain: SMC, TDS and FK steering are one filter with other proposals and potentials.

N particles of each image, never across images. log w grows by log(reference / proposal) of every step and by the step's log
potential, and the last potential makes the product of them all e^ℓ(x_0), so that the last target is p_pre(x|c) e^ℓ(x).
So E[Ẑ] = Z at any N, Ẑ = Π (mean weights before each resampling) (Del Moral 2004), and a particle that is drawn in proportion
to w at the end has the target's law as N grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ctrl_ray.baselines.dps import dps_mean
from ctrl_ray.baselines.noise import ImageNoise, ParticleNoise
from ctrl_ray.baselines.prediction import guides
from ctrl_ray.baselines.sampler import Baseline, Call
from ctrl_ray.baselines.tilt import log_tilt, log_tilt_and_gradient
from ctrl_ray.diffusion.steps import GaussianStep, gaussian_sample, step_log_ratio
from ctrl_ray.gradients.rollout import Trajectory
from ctrl_ray.policy.protocol import Inputs

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
class ParticleFilter(Baseline):
    """A baseline whose subclasses say the proposal and when the reward is asked.

    One particle of each image is kept, drawn in proportion to w; the density of its path is not known."""

    num_particles: int = 4
    """N."""
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

    @property
    def needs_gradient(self) -> bool:
        """See `Baseline`."""
        return self.twist > 0

    def draw(self, call: Call) -> Trajectory:
        """See `Baseline`."""
        found = self.filter(call)
        chosen = drawn(found.log_weights, call.noise, call.kernel.num_steps, "choice")
        return Trajectory(found.latents[:, range(len(call.inputs)), chosen], call.inputs)

    def filter(self, call: Call) -> Particles:
        """The particles of B images before one of each is drawn."""
        kernel, count, num_images = call.kernel, self.num_particles, len(call.inputs)
        rows = call.repeated(count)
        draw = ParticleNoise(call.noise, count)
        latents = draw(0)
        log_weights = torch.zeros(num_images, count, dtype=torch.float64, device=latents.device)
        potentials = _Potentials(self.potential, torch.zeros_like(log_weights))
        log_z = log_weights.new_zeros(num_images)
        kept, parents = [latents], []
        for step_index in range(kernel.num_steps):
            ref, proposal, tilts = self._propose(call, step_index, latents, rows)
            if tilts is not None:
                log_weights = log_weights + potentials.log_increment(tilts.view(-1, count))
            chosen = torch.arange(num_images * count, device=latents.device)
            if self.asks(step_index) and kernel.std(step_index) > 0:
                chosen, gained = _resampled(log_weights, call.noise, step_index)
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
            call.on_step(step_index, latents)
        last = log_tilt(call.rewards, latents, rows, self.exponents).view(-1, count)
        log_weights = log_weights + last - potentials.product
        log_z = log_z + log_weights.logsumexp(1) - math.log(count)
        return Particles(_traced(kept, parents, (num_images, count)), log_weights, log_z)

    def _propose(
        self, call: Call, step_index: int, latents: Tensor, inputs: Inputs
    ) -> tuple[GaussianStep, GaussianStep | None, Tensor | None]:
        """(the pre-trained model's step, another proposal if there is one, ℓ(x̂_0) where it is asked), of all particles."""
        twisted = self.twist > 0 and guides(call.kernel, step_index)
        prediction = call.predict(step_index, latents, inputs, with_graph=twisted)
        ref = prediction.step
        if twisted:
            tilts, gradient = log_tilt_and_gradient(call.rewards, prediction.denoised.x_0, inputs, self.exponents)
            mean = dps_mean(prediction, prediction.pull_back(gradient), self.twist)
            return ref, GaussianStep(mean, ref.std), tilts
        if not self.asks(step_index):
            return ref, None, None
        return ref, None, log_tilt(call.rewards, prediction.detached().x_0, inputs, self.exponents)


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
