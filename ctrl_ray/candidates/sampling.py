"""Drawing K candidates for each image and keeping one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctrl_ray.candidates.weights import candidate_log_weights, log_tilts, num_pre_trained, selection_noise
from ctrl_ray.config import Precision
from ctrl_ray.diffusion.noise import draw_noise
from ctrl_ray.diffusion.steps import StepKernel
from ctrl_ray.errors import ConfigError
from ctrl_ray.evaluation.certificate import effective_sample_size
from ctrl_ray.gradients.rollout import NoiseSource, Trajectory, rollout
from ctrl_ray.policy.outputs import require_finite
from ctrl_ray.policy.protocol import Inputs, Policy
from ctrl_ray.rewards.protocol import Rewards


class Chunk(NamedTuple):
    """Candidates that are rolled out together, all by the same model."""

    reference: bool
    """By the pre-trained model."""
    images: tuple[int, ...]
    candidates: tuple[int, ...]
    """Number of each inside its group."""


@dataclass(frozen=True)
class CandidatePlan:
    """How K candidates of each of B images are divided between the models, and into chunks."""

    num_images: int
    num_candidates: int
    share: float | None
    """Share of pre-trained paths that is wanted; None: the pre-trained model draws all of them."""
    batch_size: int
    """Trajectories at a time."""

    def __post_init__(self) -> None:
        for name in ("num_candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")

    @property
    def num_pre_trained(self) -> int:
        """Of a group; they are its first."""
        return self.num_candidates if self.share is None else num_pre_trained(self.num_candidates, self.share)

    def chunks(self) -> list[Chunk]:
        """Every candidate of every image once, the pre-trained model's first."""
        first = self.num_pre_trained
        return [
            chunk
            for reference, numbers in ((True, range(first)), (False, range(first, self.num_candidates)))
            for chunk in self._divided(reference, [(i, j) for j in numbers for i in range(self.num_images)])
        ]

    def _divided(self, reference: bool, pairs: Sequence[tuple[int, int]]) -> list[Chunk]:
        parts = [pairs[start : start + self.batch_size] for start in range(0, len(pairs), self.batch_size)]
        return [Chunk(reference, tuple(i for i, _ in part), tuple(j for _, j in part)) for part in parts]


def check_density(kernel: StepKernel, plan: CandidatePlan) -> None:
    """ConfigError where the policy is to take a step without noise: its paths have no density, so no weights."""
    steps = [k for k in range(kernel.num_steps) if kernel.controlled(k) and kernel.std(k) == 0]
    if plan.share is not None and steps:
        raise ConfigError(
            f"num_candidates is {plan.num_candidates}, but denoising step {steps[0]} has no noise (eta 0), so paths have no "
            "density to be weighed by; leave eta as the adapter was trained, or set num_candidates (--candidates) to 1"
        )


@dataclass(frozen=True)
class ChosenPaths:
    """One path for each image."""

    trajectory: Trajectory
    ess: Tensor
    """(B,) float64: effective sample size (Σ w)² / Σ w² of each group, 1 … K. Near 1 a single candidate had all the weight,
    and the image's law may still be far from the target."""


def sample_candidates(
    policy: Policy,
    kernel: StepKernel,
    inputs: Inputs,
    rewards: Rewards,
    exponents: Mapping[str, float],
    seeds: Sequence[int],
    shape: Sequence[int],
    plan: CandidatePlan,
    *,
    initial_noise: Tensor | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
    precision: Precision = "fp32",
) -> ChosenPaths:
    """Draw `plan.num_candidates` paths for each image and keep one, with probability proportional to its weight.

    The noise and the choice of candidate j of an image depend on (its seed, j) alone: not on the other images, nor on the
    chunks. Beside the paths that are kept, one chunk is in memory at a time.

    Args:
        inputs: Of B images.
        rewards: What `class_log_probs` of the asked controls comes from.
        exponents: guidance_strength / kl_coef of every control, in the order of the labels' columns.
        seeds: One for each image.
        shape: Of one image's latents.
        initial_noise: x_T (B, *shape), the same for all candidates of an image; None: each has its own. With it the image's
            law tends to the target's given this x_T.
        on_step: Told each step's index and its next latents, chunk by chunk.
        precision: The denoiser's, for the message of NonFiniteError, which a candidate's latents that are NaN or infinite are.
    """
    count, weights = len(inputs), np.full((len(inputs), plan.num_candidates), -np.inf)
    share = plan.num_pre_trained / plan.num_candidates
    kept: Tensor | None = None
    best = np.full(count, -np.inf)
    for chunk in plan.chunks():
        rows = list(chunk.images)
        part = inputs.select(rows)
        noise = _noise(seeds, chunk, shape, kernel.num_steps, part.labels.device, initial_noise)
        scored = plan.share is not None
        trajectory = rollout(
            policy, kernel, part, noise, reference=chunk.reference, with_log_ratio=scored, on_step=on_step
        )
        prompts, of_images = part.condition.prompts, [seeds[image] for image in rows]
        require_finite("latents", trajectory.clean_latents, prompts, of_images, precision)
        beliefs = rewards.class_log_probs(trajectory.clean_latents, prompts)
        tilts = log_tilts(
            {name: values.cpu().numpy() for name, values in beliefs.items()}, part.labels.cpu().numpy(), exponents
        )
        ratios = trajectory.log_ratio.cpu().numpy() if scored and trajectory.log_ratio is not None else None
        found = candidate_log_weights(tilts, ratios, share)
        if kept is None:
            latents = trajectory.latents
            kept = latents.new_zeros(len(latents), count, *latents.shape[2:])
        for row, (image, candidate) in enumerate(zip(chunk.images, chunk.candidates, strict=True)):
            weights[image, candidate] = found[row]
            score = found[row] + selection_noise(seeds[image], candidate)
            if score > best[image]:
                best[image] = score
                kept[:, image] = trajectory.latents[:, row]
    assert kept is not None
    ess = torch.tensor([effective_sample_size(group) for group in weights], dtype=torch.float64)
    return ChosenPaths(Trajectory(kept, inputs), ess)


def _noise(
    seeds: Sequence[int],
    chunk: Chunk,
    shape: Sequence[int],
    num_steps: int,
    device: torch.device,
    initial_noise: Tensor | None,
) -> NoiseSource:
    pairs = zip(chunk.images, chunk.candidates, strict=True)
    whole = torch.cat(
        [draw_noise(seeds[i], 0, [j], "candidate", (num_steps + 1, *shape), device=device) for i, j in pairs]
    )

    def noise(index: int) -> Tensor:
        if index == 0 and initial_noise is not None:
            return initial_noise[list(chunk.images)].to(device, torch.float32)
        return whole[:, index]

    return noise
