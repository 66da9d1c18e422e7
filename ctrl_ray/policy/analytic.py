"""Denoisers in closed form, with a small correction per step as the policy: for problems whose answer is known.

Data are D independent coordinates with the same one-dimensional Gaussian mixture as their law; the prompt chooses the
mixture's weights. Everything else (rollout, rewards, adjoint pass, engine) is the code of an image pipeline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from ctrl_ray.diffusion.steps import DenoisingKernel, ModelOutput
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.protocol import Condition, Inputs, TrainablePolicy


def analytic_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule and timestep spacing, ending at ᾱ of the first training step."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


class MixtureDenoiser(nn.Module):
    """ε(x, t) = −√(1 − ᾱ_t) ∇ log p_t(x), p_t = Σ_i w_i N(√ᾱ_t m_i, ᾱ_t s_i² + 1 − ᾱ_t), for every coordinate."""

    alphas: Tensor
    means: Tensor
    stds: Tensor

    def __init__(self, means: Sequence[float], stds: Sequence[float], alphas_cumprod: Tensor) -> None:
        super().__init__()
        if len(means) != len(stds) or not means or min(stds) <= 0:
            raise ConfigError(f"a mixture needs as many means {tuple(means)} as positive stds {tuple(stds)}")
        self.register_buffer("alphas", alphas_cumprod.float())
        self.register_buffer("means", torch.tensor(means, dtype=torch.float32))
        self.register_buffer("stds", torch.tensor(stds, dtype=torch.float32))

    def forward(self, latents: Tensor, time: Tensor, log_weights: Tensor) -> Tensor:
        """ε like the latents (B, D); log_weights (B, K) of the mixture's components."""
        alpha = self.alphas[time.to(self.alphas.device)].to(latents.dtype)
        means = alpha.sqrt() * self.means.to(latents.dtype)
        variances = alpha * self.stds.to(latents.dtype) ** 2 + 1 - alpha
        z = latents[..., None] - means
        if len(means) == 1:
            return (1 - alpha).sqrt() * z[..., 0] / variances[0]
        logits = log_weights[:, None, :].to(latents.dtype) - 0.5 * z**2 / variances - 0.5 * variances.log()
        return (1 - alpha).sqrt() * (logits.softmax(-1) * z / variances).sum(-1)


class MixtureVelocity(nn.Module):
    """E[ε − x_0 | x] where x = (1 − σ) x_0 + σ ε, for every coordinate; time is 1000 σ."""

    means: Tensor
    stds: Tensor

    def __init__(self, means: Sequence[float], stds: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("means", torch.tensor(means, dtype=torch.float32))
        self.register_buffer("stds", torch.tensor(stds, dtype=torch.float32))

    def forward(self, latents: Tensor, time: Tensor, log_weights: Tensor) -> Tensor:
        """Like the latents (B, D); log_weights (B, K) of the mixture's components."""
        sigma = (time / 1000).to(latents)
        means, stds = self.means.to(latents), self.stds.to(latents)
        variances = ((1 - sigma) * stds) ** 2 + sigma**2
        z = latents[..., None] - (1 - sigma) * means
        logits = log_weights[:, None, :].to(latents.dtype) - 0.5 * z**2 / variances - 0.5 * variances.log()
        return (logits.softmax(-1) * ((sigma - (1 - sigma) * stds**2) * z / variances - means)).sum(-1)


class MixtureEncoder:
    """Prompts to the mixture's weights."""

    def __init__(self, weights: Mapping[str, Sequence[float]], device: torch.device | str = "cpu") -> None:
        """weights: positive numbers of each prompt, normalised here."""
        rows = {prompt: torch.tensor(row, dtype=torch.float32, device=device) for prompt, row in weights.items()}
        self._log_weights = {prompt: (row / row.sum()).log() for prompt, row in rows.items()}

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Condition with 'log_weights' (B, K); ConfigError for a prompt without weights."""
        unknown = sorted(set(prompts) - set(self._log_weights))
        if unknown:
            raise ConfigError(f"prompts {unknown} have no mixture weights; known ones are {sorted(self._log_weights)}")
        return Condition(
            tuple(prompts), {"log_weights": torch.stack([self._log_weights[prompt] for prompt in prompts])}
        )


class AnalyticPolicy(TrainablePolicy):
    """The closed-form denoiser, and a trainable push per step, label and coordinate: the mean moves by std_k · u_k(x).

    u_k is piecewise linear in x between nodes that cover where x_k can be, so the KL of a step is u_k² / 2, and one
    learning rate suits all steps. u = 0 at the start: policy equals reference bit for bit.
    """

    def __init__(
        self,
        denoiser: MixtureDenoiser | MixtureVelocity,
        kernel: DenoisingKernel,
        num_classes: Mapping[str, int],
        *,
        dimension: int = 1,
        num_nodes: int = 41,
        reach: float = 4.5,
        shared_steps: bool = False,
    ) -> None:
        """reach: how many standard deviations beyond a step's outermost component the nodes go. shared_steps: one push
        for all steps, as the weights of a network are shared; it can reach less, and estimators differ more."""
        super().__init__()
        self.latent_shape = (dimension,)
        self.denoiser = denoiser
        self._num_nodes = num_nodes
        self._step_of_time = {float(kernel.time(k)): k for k in range(kernel.num_steps)}
        ranges, factors = [], []
        for k in range(kernel.num_steps):
            of_x_0, of_noise = kernel.scales(k)
            centres = of_x_0 * denoiser.means
            spreads = ((of_x_0 * denoiser.stds) ** 2 + of_noise**2).sqrt() * reach
            ranges.append((float((centres - spreads).min()), float((centres + spreads).max())))
            one = torch.ones(1, 1, dtype=torch.float64)  # the mean is linear in the prediction
            of_prediction = float(kernel.step(k, torch.zeros_like(one), ModelOutput(one)).mean)
            factors.append(kernel.std(k) / of_prediction)
        self._ranges, self._factors = ranges, factors
        self.num_classes = dict(num_classes)
        self._shared_steps = shared_steps
        shape = (1 if shared_steps else kernel.num_steps, dimension, num_nodes)
        self.pushes = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(classes, *shape)) for name, classes in num_classes.items()}
        )

    def forward(self, latents: Tensor, time: Tensor, inputs: Inputs, *, reference: bool) -> ModelOutput:
        """ε or v of latents (B, D); there is no guidance of a mixture."""
        prediction = self.denoiser(latents, time, inputs.condition.tensors["log_weights"])
        if reference:
            return ModelOutput(prediction)
        step_index = self._step_of_time[float(time)]
        return ModelOutput(prediction + self._factors[step_index] * self._push(latents, inputs.labels, step_index))

    def parameter_groups(self, learning_rate: float, embedding_learning_rate: float) -> list[dict[str, Any]]:
        """One group: the pushes."""
        return [{"params": list(self.pushes.values()), "lr": learning_rate, "name": "pushes"}]

    def _push(self, latents: Tensor, labels: Tensor, step_index: int) -> Tensor:
        """u_k(x), like the latents."""
        low, high = self._ranges[step_index]
        last = self._num_nodes - 1
        position = ((latents - low) * (last / (high - low))).clamp(0.0, float(last))
        node = position.detach().floor().clamp(max=last - 1).long()
        fraction = position - node
        dimension = latents.shape[1]
        row = torch.arange(dimension, device=latents.device) * self._num_nodes + node
        total = torch.zeros_like(latents)
        for column, (name, classes) in enumerate(self.num_classes.items()):
            asked = labels[:, column]
            values = self.pushes[name][:, 0 if self._shared_steps else step_index].reshape(-1, 1)
            index = asked.clamp(max=classes - 1)[:, None] * (dimension * self._num_nodes) + row
            left, right = (nn.functional.embedding(index + side, values)[..., 0] for side in (0, 1))
            push = left + fraction * (right - left)
            total = total + torch.where((asked < classes)[:, None], push, torch.zeros_like(push))
        return total
