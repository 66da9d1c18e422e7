"""Flow matching (Lipman et al. 2023; Liu et al. 2023) as a chain of Gaussians: the ancestral step, and the SDEs in use.

x_σ = (1 − σ) x_0 + σ ε, σ from 1 (noise) to 0, and the network predicts v ≈ ε − x_0, so

    x_0 = x − σ v,      ε = x + (1 − σ) v.

All kernels here have a mean of the form (1 − σ') x_0 + b ε for the step σ → σ'. They differ in b and in the noise they add:

    ancestral   std = η σ' √(1 − ρ²), ρ = (1 − σ) σ' / ((1 − σ') σ),        b = √(σ'² − std²)
    cps         std = σ' sin(η π / 2)                                       b = √(σ'² − std²)
    flow_grpo   std = g √(σ − σ'),  g = η √(σ / (1 − σ))                     b = σ' − g² (σ − σ') / (2 σ)
    constant    std = g √(σ − σ'),  g = η                                   b as flow_grpo's

`ancestral` with η = 1 is DDIM's step with eta 1 (`ctrl_ray.diffusion.ddim`) at ᾱ = (1−σ)² / ((1−σ)² + σ²) on latents over
√((1−σ)² + σ²): it forgets the noise that it began with as far as x_0's prediction at σ = 1 does not depend on it, which the
guarantee of CTRL needs. `cps` is Coefficients-Preserving Sampling (Wang & Yu 2025). `flow_grpo` is the Euler step of
Flow-GRPO (Liu et al. 2025), whose η is 0.7, and which forgets at η = √2 and many steps; its g is infinite at σ = 1, and takes
the next σ there, as theirs does. A step to σ' = 0 gives x_0 itself under all of them, and has no density.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ctrl_ray.config import FlowSDE
from ctrl_ray.diffusion.steps import Denoised, GaussianStep, ModelOutput, Scales
from ctrl_ray.diffusion.tables import StepTables
from ctrl_ray.errors import ConfigError


def flow_sigmas(num_steps: int, *, shift: float = 1.0) -> list[float]:
    """σ of noise, of every step's outcome, last 0: num_steps + 1 numbers, evenly spaced and then shifted once,
    σ ← s σ / (1 + (s − 1) σ) (Esser et al. 2024, eq. 23). SD3 has shift 3; a dynamic shift μ is shift e^μ."""
    if num_steps < 1:
        raise ConfigError(f"a flow has {num_steps} steps; expected at least 1")
    return shifted_sigmas([1 - index / num_steps for index in range(num_steps)], shift)


def shifted_sigmas(sigmas: Sequence[float], shift: float) -> list[float]:
    """Of every step, noise first, shifted as in `flow_sigmas`; and a last one, 0."""
    if not 0 < shift < math.inf:
        raise ConfigError(f"the shift of a flow is {shift}; expected a positive number")
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in sigmas] + [0.0]


def dynamic_shift(
    num_tokens: int, *, few: tuple[int, float] = (256, 0.5), many: tuple[int, float] = (4096, 1.15)
) -> float:
    """e^μ with μ linear in the number of the latents' tokens through two points (tokens, μ); FLUX has the defaults."""
    slope = (many[1] - few[1]) / (many[0] - few[0])
    return math.exp(few[1] + slope * (num_tokens - few[0]))


class FlowKernel:
    """A `DenoisingKernel` of flow matching; the table at the top of the module says what `sde` and `eta` are.

    Coefficients are computed in float64 and applied in the latents' dtype.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        *,
        sde: FlowSDE = "ancestral",
        eta: float = 1.0,
        time_scale: float = 1000.0,
        reference_steps: int = 0,
    ) -> None:
        """sigmas: as of `flow_sigmas`, falling, in [0, 1]. time_scale: what σ is multiplied with for the network's time.
        reference_steps: how many of the last steps belong to the reference (see `StepKernel.controlled`); one at least is
        needed where the last σ is 0, because that step has no density."""
        table = [float(sigma) for sigma in sigmas]
        if len(table) < 2 or not all(1 >= a > b >= 0 for a, b in zip(table, table[1:], strict=False)):
            raise ConfigError(
                f"sigmas of a flow are {table}; expected at least two numbers that fall, from at most 1 to 0 or more"
            )
        most = math.inf if sde in ("flow_grpo", "constant") else 1.0
        if not 0 <= eta <= most:
            raise ConfigError(f"eta is {eta} with the flow's SDE {sde!r}; expected a number from 0 to {most:g}")
        self.sde: FlowSDE = sde
        self.eta = eta
        self.reference_steps = reference_steps
        self._sigmas = table
        coefficients = [self._coefficients(index, eta) for index in range(self.num_steps)]
        self._stds = [std for std, _ in coefficients]
        self._of_noise = [of_noise for _, of_noise in coefficients]
        self._noisy = [self._coefficients(index, 1.0)[0] > 0 for index in range(self.num_steps)]
        self._times = [time_scale * sigma for sigma in table[:-1]]
        self._tables = StepTables()

    @property
    def num_steps(self) -> int:
        """Number of denoising steps."""
        return len(self._sigmas) - 1

    def time(self, step_index: int, device: torch.device | str = "cpu") -> Tensor:
        """time_scale · σ (float32 scalar) of the step."""
        return self._tables("time", self._times, torch.float32, device)[step_index]

    def scales(self, step_index: int) -> Scales:
        """(1 − σ, σ)."""
        return Scales(1 - self._sigmas[step_index], self._sigmas[step_index])

    def next_scales(self, step_index: int) -> Scales:
        """(1 − σ', σ')."""
        return self.scales(step_index + 1)

    def std(self, step_index: int) -> float:
        """Standard deviation of the step's noise; exactly 0 where the step is deterministic."""
        return self._stds[step_index]

    def controlled(self, step_index: int) -> bool:
        """As `StepKernel.controlled`; a step to σ' = 0 has no density."""
        return self._noisy[step_index] and step_index < self.num_steps - self.reference_steps

    def step(self, step_index: int, latents: Tensor, output: ModelOutput) -> GaussianStep:
        """Law of the next latents; the mean in the latents' dtype, the std a scalar tensor."""
        mean = self.mean_from(step_index, self.denoised(step_index, latents, output))
        return GaussianStep(mean, self._tables("std", self._stds, latents.dtype, latents.device)[step_index])

    def denoised(self, step_index: int, latents: Tensor, output: ModelOutput) -> Denoised:
        """(x_0, ε) that the velocity at this step implies, like the latents."""
        sigma, velocity = self._sigmas[step_index], output.prediction.to(latents.dtype)
        return Denoised(latents - sigma * velocity, latents + (1 - sigma) * velocity)

    def mean_from(self, step_index: int, denoised: Denoised) -> Tensor:
        """The step's mean (1 − σ') x_0 + b ε of any x_0 and ε."""
        return (1 - self._sigmas[step_index + 1]) * denoised.x_0 + self._of_noise[step_index] * denoised.noise

    def _coefficients(self, step_index: int, eta: float) -> tuple[float, float]:
        """(std, b) of a step."""
        sigma, following = self._sigmas[step_index : step_index + 2]
        if following == 0:
            return 0.0, 0.0
        if self.sde in ("ancestral", "cps"):
            if self.sde == "cps":
                std = following * math.sin(eta * math.pi / 2)
            else:
                kept = (1 - sigma) * following / ((1 - following) * sigma)
                std = eta * following * math.sqrt(1 - kept**2)
            return std, math.sqrt(max(0.0, following**2 - std**2))
        at = sigma if sigma < 1 else following
        strength = eta * math.sqrt(at / (1 - at)) if self.sde == "flow_grpo" else eta
        fall = sigma - following
        return strength * math.sqrt(fall), following - strength**2 * fall / (2 * sigma)
