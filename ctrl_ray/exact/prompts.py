"""Labels that depend on the prompt even for a given x, and what a classifier makes of them that is not shown the prompt.

Labelled data come from p(c) p(x|c) p(y|x,c). Maximum likelihood on (c, x, y) converges to p(y|x,c), on (x, y) alone to

    p̄(y|x) = Σ_c p(c|x) p(y|x,c),    p(c|x) = p(c) p(x|c) / Σ_c' p(c') p(x|c'),

which is p(y|x,c) only where y ⟂ c | x. A policy that is trained with p̄ converges, for each prompt, to
q̄(x) ∝ p_pre(x|c) p̄(y|x)^λ in place of q(x) ∝ p_pre(x|c) p(y|x,c)^λ. With h = (p̄(y|x) / p(y|x,c))^λ the mean of any f(x),
such as x itself, 1{x > 0}, or the accuracy p(y|x,c), is off by

    E_q̄[f] − E_q[f] = Cov_q[f, h] / E_q[h].

The prompts whose labels are the strictest are tilted too little, for p̄ believes in y too early, and the mildest too much.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import logsumexp

from ctrl_ray.errors import ConfigError
from ctrl_ray.exact.problems import Array, Mixture, Reward


@dataclass(frozen=True, kw_only=True)
class PromptRule:
    """One prompt c of labelled data: how often it occurs, its x, and how they are labelled."""

    share: float
    """p(c), up to a factor that all prompts share."""
    mixture: Mixture
    """p(x|c)."""
    reward: Reward
    """log p(y|x,c)."""

    def __post_init__(self) -> None:
        if not (np.isfinite(self.share) and self.share > 0):
            raise ConfigError(f"the share of a prompt is {self.share}; expected a positive number")


@dataclass(frozen=True)
class MarginalReward:
    """log p̄(y|x) of the module's docstring: the limit of a classifier that is fitted without the prompt."""

    rules: tuple[PromptRule, ...]
    """One for each prompt."""

    def __post_init__(self) -> None:
        if not self.rules:
            raise ConfigError("a marginal reward averages over prompts, but got none; give at least one")

    def log_prob(self, x: Array) -> Array:
        """Log-probability in nats."""
        joint = np.stack([np.log(rule.share) + rule.mixture.log_density(x) for rule in self.rules])
        labelled = joint + np.stack([rule.reward.log_prob(x) for rule in self.rules])
        return np.asarray(logsumexp(labelled, axis=0) - logsumexp(joint, axis=0))
