"""The DDIM reverse process (Song et al. 2021, eq. 12 and 16) as a chain of Gaussians."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ctrl_ray.diffusion.steps import Denoised, GaussianStep, ModelOutput, Scales
from ctrl_ray.diffusion.tables import StepTables
from ctrl_ray.errors import ConfigError

PredictionType = Literal["epsilon", "v_prediction", "sample"]


def predict_x_0_and_noise(
    latents: Tensor, prediction: Tensor, alpha_prod_t: float, prediction_type: PredictionType
) -> tuple[Tensor, Tensor]:
    """(x_0, ε) that a prediction implies at ᾱ_t: x_t = √ᾱ x_0 + √(1−ᾱ) ε and v = √ᾱ ε − √(1−ᾱ) x_0."""
    signal, noise = alpha_prod_t**0.5, (1 - alpha_prod_t) ** 0.5
    if prediction_type == "epsilon":
        return (latents - noise * prediction) / signal, prediction
    if prediction_type == "v_prediction":
        return signal * latents - noise * prediction, signal * prediction + noise * latents
    if prediction_type == "sample":
        return prediction, (latents - signal * prediction) / noise
    raise ConfigError(f"prediction_type {prediction_type!r} is unknown; expected epsilon, v_prediction or sample")


class DDIMKernel:
    """DDIM with stochasticity eta: mean √ᾱ' x_0 + √(1−ᾱ'−σ²) ε, σ = eta √((1−ᾱ')/(1−ᾱ) · (1−ᾱ/ᾱ')).

    Coefficients are computed in float64 and applied in the latents' dtype (float32 in every run). eta = 1 is
    ancestral sampling, nearly memoryless, as the guarantee of CTRL needs.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        timesteps: Sequence[int],
        *,
        final_alpha_cumprod: float,
        eta: float,
        prediction_type: PredictionType,
        num_train_timesteps: int | None = None,
        reference_steps: int = 0,
    ) -> None:
        """alphas_cumprod: ᾱ of every training timestep; timesteps: in sampling order (descending).

        final_alpha_cumprod: ᾱ after the last step; 1.0 (or a last timestep of 0) makes the last step deterministic.
        reference_steps: how many of the last steps belong to the reference (see `StepKernel.controlled`).
        """
        if not 0 <= eta <= 1:
            raise ConfigError(f"eta is {eta}; expected a number in [0, 1]")
        self.eta = eta
        self.reference_steps = reference_steps
        self.prediction_type: PredictionType = prediction_type
        self._timesteps = [int(t) for t in timesteps]
        table = alphas_cumprod.double().tolist()
        stride = (num_train_timesteps or len(table)) // len(self._timesteps)
        self._alphas = [table[t] for t in self._timesteps]
        self._next_alphas = [table[t - stride] if t - stride >= 0 else final_alpha_cumprod for t in self._timesteps]
        ancestral = [
            (max(0.0, (1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha))) ** 0.5
            for alpha, next_alpha in zip(self._alphas, self._next_alphas, strict=True)
        ]
        self._noisy = [std > 0 for std in ancestral]
        self._stds = [eta * std for std in ancestral]
        self._tables = StepTables()

    @property
    def num_steps(self) -> int:
        """Number of denoising steps."""
        return len(self._timesteps)

    def time(self, step_index: int, device: torch.device | str = "cpu") -> Tensor:
        """Timestep (int64 scalar) of the step."""
        return self._tables("time", self._timesteps, torch.int64, device)[step_index]

    def std(self, step_index: int) -> float:
        """std_dev_t of the step; exactly 0 where the step is deterministic."""
        return self._stds[step_index]

    def controlled(self, step_index: int) -> bool:
        """Whether the policy takes this step: it would have a density at eta 1, and is not one of the last
        `reference_steps`. At eta 0 the policy may sample, but nothing has a KL."""
        return self._noisy[step_index] and step_index < self.num_steps - self.reference_steps

    def scales(self, step_index: int) -> Scales:
        """(√ᾱ_t, √(1−ᾱ_t))."""
        return _scales(self._alphas[step_index])

    def next_scales(self, step_index: int) -> Scales:
        """(√ᾱ', √(1−ᾱ'))."""
        return _scales(self._next_alphas[step_index])

    def step(self, step_index: int, latents: Tensor, output: ModelOutput) -> GaussianStep:
        """Law of the next latents; the mean in the latents' dtype, the std a scalar tensor (or like the latents when
        the model has a learned variance)."""
        mean = self.mean_from(step_index, self.denoised(step_index, latents, output))
        std_tensor = self._tables("std", self._stds, latents.dtype, latents.device)[step_index]
        if output.log_std_ratio is not None:
            std_tensor = std_tensor * output.log_std_ratio.to(latents.dtype).exp()
        return GaussianStep(mean, std_tensor)

    def denoised(self, step_index: int, latents: Tensor, output: ModelOutput) -> Denoised:
        """(x_0, ε) that the prediction at this step implies, like the latents."""
        x_0, noise = predict_x_0_and_noise(
            latents, output.prediction.to(latents.dtype), self._alphas[step_index], self.prediction_type
        )
        return Denoised(x_0, noise)

    def mean_from(self, step_index: int, denoised: Denoised) -> Tensor:
        """The step's mean √ᾱ' x_0 + √(1−ᾱ'−σ²) ε of any x_0 and ε."""
        alpha_prod_next, std = self._next_alphas[step_index], self._stds[step_index]
        direction = max(0.0, 1 - alpha_prod_next - std**2) ** 0.5
        return alpha_prod_next**0.5 * denoised.x_0 + direction * denoised.noise


def _scales(alpha_prod: float) -> Scales:
    return Scales(alpha_prod**0.5, (1 - alpha_prod) ** 0.5)
