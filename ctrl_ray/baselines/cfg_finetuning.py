"""Fine-tuning for classifier-free guidance of a label (Ho & Salimans 2022): the denoiser is fitted to labelled images.

The loss of an image with latents x_0, prompt c and labels y is ‖ε − ε_θ(x_t, t, c, y)‖², x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε, with t
uniform over the noise schedule. Each label is null with some probability, so that the sampler

    ε_∅∅ + w_c (ε_c∅ − ε_∅∅) + w_y (ε_cy − ε_c∅),      `Guidance(scale=w_c, control_scale=w_y)`,

has its branches. At w_c = w_y = 1 the minimiser samples the data's own law of x given (c, y), whatever the pre-trained model
draws; another w_y has no law that is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl_ray.baselines.labelled import LabelledLatents
from ctrl_ray.baselines.noising import NoiseSchedule
from ctrl_ray.diffusion.noise import draw_noise, draw_uniform
from ctrl_ray.policy.protocol import Condition, Inputs, Policy


@dataclass(frozen=True, kw_only=True, eq=False)
class DenoisingBatch:
    """B images to denoise, each from a noise of its own."""

    latents: Tensor
    """(B, ...), clean."""
    noise: Tensor
    """Like the latents."""
    timesteps: Tensor
    """(B,) int64."""
    prompts: tuple[str, ...]
    labels: Tensor
    """(B, C) int64; a control's number of classes = null."""

    def to(self, device: torch.device | str) -> DenoisingBatch:
        """The same on a device."""
        moved = (tensor.to(device) for tensor in (self.latents, self.noise, self.timesteps, self.labels))
        latents, noise, timesteps, labels = moved
        return DenoisingBatch(latents=latents, noise=noise, timesteps=timesteps, prompts=self.prompts, labels=labels)


def draw_batch(
    images: LabelledLatents,
    num_timesteps: int,
    control_dropout: float,
    *,
    seed: int,
    update: int,
    sample_ids: Sequence[int],
) -> DenoisingBatch:
    """Image and timestep uniform, each label null with probability `control_dropout` for itself.

    Sample i of an update depends on (seed, update, i) alone, on whatever rank it lands.
    """

    def uniform(purpose: str) -> list[float]:
        return [draw_uniform(seed, update, sample_id, purpose) for sample_id in sample_ids]

    rows = torch.tensor([int(share * len(images)) for share in uniform("image")])
    labels = images.labels[rows]
    for column, (name, num_classes) in enumerate(images.num_classes.items()):
        dropped = torch.tensor(uniform(f"dropout {name}")) < control_dropout
        labels[:, column] = torch.where(dropped, num_classes, labels[:, column])
    latents = images.latents[rows]
    return DenoisingBatch(
        latents=latents,
        noise=draw_noise(seed, update, sample_ids, "denoising", latents.shape[1:]),
        timesteps=torch.tensor([int(share * num_timesteps) for share in uniform("timestep")]),
        prompts=tuple(images.prompts[row] for row in rows.tolist()),
        labels=labels,
    )


def denoising_loss(policy: Policy, schedule: NoiseSchedule, batch: DenoisingBatch, condition: Condition) -> Tensor:
    """Mean over latent dimensions of the squared error of the policy's prediction, (B,); no guidance.

    condition: of the batch's prompts.
    """
    noisy = schedule.noised(batch.latents, batch.noise, batch.timesteps)
    output = policy(noisy, batch.timesteps, Inputs(condition, batch.labels), reference=False)
    target = schedule.target(batch.latents, batch.noise, batch.timesteps)
    return (output.prediction - target).square().flatten(1).mean(1)
