"""One-dimensional problems with a known answer: a mixture as the data, a reward, a sampler (method of CTRL, section 4)."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from scipy.special import log_expit, logsumexp

from ctrl_ray.config import FlowSDE
from ctrl_ray.errors import ConfigError

Array = np.ndarray
KernelName = Literal["ddim", "flow"]


@dataclass(frozen=True)
class Mixture:
    """Σ_i w_i N(m_i, s_i²), the law of the data."""

    means: tuple[float, ...]
    stds: tuple[float, ...]
    weights: tuple[float, ...]
    """Positive; they are normalised to sum to 1."""

    def __post_init__(self) -> None:
        sizes = {len(self.means), len(self.stds), len(self.weights)}
        if len(sizes) != 1 or not self.means:
            raise ConfigError(
                f"a mixture needs as many means ({len(self.means)}) as stds ({len(self.stds)}) and weights "
                f"({len(self.weights)}), at least one"
            )
        if min(self.stds) <= 0 or min(self.weights) <= 0:
            raise ConfigError(f"stds {self.stds} and weights {self.weights} of a mixture must be positive")
        if not np.isfinite([*self.means, *self.stds, *self.weights]).all():
            raise ConfigError(f"means {self.means}, stds {self.stds} and weights {self.weights} must be finite")

    @property
    def probabilities(self) -> Array:
        """The weights, normalised."""
        weights = np.asarray(self.weights, dtype=np.float64)
        return weights / weights.sum()

    def component_log_densities(self, x: Array, alpha_prod: float = 1.0) -> Array:
        """log(w_i N(x; √ᾱ m_i, ᾱ s_i² + 1 − ᾱ)), (..., K): the mixture diffused to ᾱ."""
        means = alpha_prod**0.5 * np.asarray(self.means)
        variances = alpha_prod * np.asarray(self.stds) ** 2 + 1 - alpha_prod
        z = np.asarray(x)[..., None] - means
        return np.log(self.probabilities) - 0.5 * z**2 / variances - 0.5 * np.log(2 * np.pi * variances)

    def log_density(self, x: Array) -> Array:
        """Of the data, like x."""
        return np.asarray(logsumexp(self.component_log_densities(x), axis=-1))

    def noise(self, x: Array, alpha_prod: float) -> Array:
        """The exact ε(x) = −√(1 − ᾱ) ∇ log p_ᾱ(x)."""
        log_densities = self.component_log_densities(x, alpha_prod)
        shares = np.exp(log_densities - logsumexp(log_densities, axis=-1, keepdims=True))
        means = alpha_prod**0.5 * np.asarray(self.means)
        variances = alpha_prod * np.asarray(self.stds) ** 2 + 1 - alpha_prod
        scores = -(np.asarray(x)[..., None] - means) / variances
        return -((1 - alpha_prod) ** 0.5) * (shares * scores).sum(-1)

    def velocity(self, x: Array, sigma: float) -> Array:
        """The exact E[ε − x_0 | x] where x = (1 − σ) x_0 + σ ε."""
        means, stds = np.asarray(self.means), np.asarray(self.stds)
        variances = ((1 - sigma) * stds) ** 2 + sigma**2
        z = np.asarray(x)[..., None] - (1 - sigma) * means
        logits = np.log(self.probabilities) - 0.5 * z**2 / variances - 0.5 * np.log(variances)
        shares = np.exp(logits - logsumexp(logits, axis=-1, keepdims=True))
        of_component = (sigma - (1 - sigma) * stds**2) * z / variances - means
        return np.asarray((shares * of_component).sum(-1))


class Reward(Protocol):
    """log p(y | x) of one coordinate x for the y that is asked for."""

    def log_prob(self, x: Array) -> Array:
        """Like x."""
        ...


@dataclass(frozen=True)
class GaussianReward:
    """log N(target; x, std²)."""

    target: float
    std: float

    def __post_init__(self) -> None:
        if self.std <= 0:
            raise ConfigError(f"reward std is {self.std}; expected a positive number")

    def log_prob(self, x: Array) -> Array:
        """Log density in nats."""
        z = (self.target - np.asarray(x)) / self.std
        return np.asarray(-0.5 * z**2 - np.log(self.std) - 0.5 * np.log(2 * np.pi))


@dataclass(frozen=True)
class LogisticReward:
    """log sigmoid(slope · x + offset): y = 1 of two classes."""

    slope: float = 1.0
    offset: float = 0.0

    def log_prob(self, x: Array) -> Array:
        """Log-probability in nats."""
        return np.asarray(log_expit(self.slope * np.asarray(x) + self.offset))


@dataclass(frozen=True)
class ComponentReward:
    """log p(component = index | x), the posterior of a mixture's component."""

    mixture: Mixture
    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < len(self.mixture.means):
            raise ConfigError(f"component {self.index} does not exist; expected 0 to {len(self.mixture.means) - 1}")

    def log_prob(self, x: Array) -> Array:
        """Log-probability in nats."""
        log_densities = self.mixture.component_log_densities(x)
        return np.asarray(log_densities[..., self.index] - logsumexp(log_densities, axis=-1))


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """DDIM on the noise schedule of Stable Diffusion: 1000 training steps, scaled-linear betas, leading timesteps. Or a flow
    from σ = 1 to 0, evenly spaced and shifted as SD3 does, whose last step has no noise and is the reference's."""

    num_steps: int = 50
    eta: float = 1.0
    """DDIM's; of a flow what `sde` makes of it."""
    kernel: KernelName = "ddim"
    sde: FlowSDE = "ancestral"
    """Of a flow (`ctrl_ray.diffusion.flow`)."""
    shift: float = 3.0
    """Of a flow: σ ← shift · σ / (1 + (shift − 1) σ)."""

    def __post_init__(self) -> None:
        if not self.fewest_steps <= self.num_steps <= 1000:
            raise ConfigError(f"num_steps is {self.num_steps}; expected {self.fewest_steps} to 1000")
        most = math.inf if self.sde in ("flow_grpo", "constant") else 1
        if not 0 < self.eta <= most:
            raise ConfigError(f"eta is {self.eta}; expected a number in (0, {most}]: a step without noise has no KL")
        if self.kernel == "ddim" and self.sde != "ancestral":
            raise ConfigError(f"the SDE {self.sde!r} is one of flow matching; give --kernel flow with it")

    @property
    def fewest_steps(self) -> int:
        """Fewest steps: a flow's last is not controlled."""
        return 2 if self.kernel == "flow" else 1

    @property
    def reference_steps(self) -> int:
        """Steps at the end that the reference takes."""
        return 1 if self.kernel == "flow" else 0


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Maximise E[guidance_strength · log p(y | x_0)] − kl_coef · KL over policies of a sampler of the mixture."""

    name: str
    mixture: Mixture
    rewards: tuple[Reward, ...]
    """The reward of coordinate 0, and of coordinate 1 when there are two controls."""
    guidance_strengths: tuple[float, ...] = (1.0,)
    kl_coef: float = 1.0
    sampler: Sampler = dataclasses.field(default_factory=Sampler)
    dimension: int = 1
    """Independent coordinates, each with the mixture as its law; those without a reward are along for the ride."""
    repeated: bool = False
    """Every coordinate has the one reward: they are independent repeats of the same problem."""

    def __post_init__(self) -> None:
        if self.dimension < len(self.rewards):
            raise ConfigError(f"dimension is {self.dimension}, but {len(self.rewards)} coordinates have a reward")
        if self.repeated and (len(self.rewards) != 1 or self.dimension < 2):
            raise ConfigError(
                f"problem {self.name} is repeated in each of its coordinates: it needs one reward, got {len(self.rewards)}, "
                f"and a dimension of at least 2, got {self.dimension}"
            )
        if len(self.rewards) != len(self.guidance_strengths):
            raise ConfigError(
                f"{len(self.rewards)} controls need as many guidance strengths, got {self.guidance_strengths}"
            )
        if self.kl_coef <= 0 or min(self.guidance_strengths) < 0:
            raise ConfigError(
                f"kl_coef is {self.kl_coef} and guidance strengths are {self.guidance_strengths}; expected a positive "
                "number and numbers >= 0"
            )
