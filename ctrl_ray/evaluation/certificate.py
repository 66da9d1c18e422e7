"""How far a sampler is from its target, by the weights of its own paths; nothing else is sampled.

CTRL's target is the law of the pre-trained model's paths times exp(Σ_c γ_c log p̂_c(y_c|x_0) / β), normalised by Z (γ:
guidance strength, β: kl_coef). A path of the policy q with the steps' noises z has the weight

    log w = Σ_c (γ_c / β) log p̂_c(y_c|x_0) − Σ_k (z_k · u_k + ½ ‖u_k‖²),   u_k = (policy's mean − reference's mean) / std_k

(the second sum is `Trajectory.log_ratio`). E_q[w] = Z whatever the policy is, E_q[log w] = J / β, the objective of CTRL, and

    gap = log Z − J / β = KL(policy's paths ‖ target's paths) ≥ 0   nats.

log Z = log E_pre[exp(Σ_c (γ_c / β) log p̂_c)] comes from samples of the pre-trained model, the same for every policy. Where the
log-ratio of their paths is known too, both kinds of paths give it together (`mixture_log_weights`): pre-trained ones see what
the policy never visits, and the policy's see what is rare without it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp

from ctrl_ray.config import ControlConfig
from ctrl_ray.evaluation.metric_names import CERTIFICATE_METRICS
from ctrl_ray.evaluation.metrics import mean_standard_error
from ctrl_ray.evaluation.samples import EvaluationSamples

GROUP_SIZE = 16
"""Paths whose mean weight makes the lower bound; more come nearer to log Z and leave fewer groups."""
TRUSTED_PARETO_K = 0.7
"""Above it a mean of weights has no useful error (Vehtari et al. 2024, PSIS)."""
CLASS_CERTIFICATE = "certificate/"
"""Prefix of what `certify_evaluation` says of one class: 'certificate/CONTROL/CLASS'."""
_FEWEST_IN_TAIL = 5
_EQUAL_WEIGHTS = 1e-8
"""Weights that differ by less than this share of the largest differ by rounding."""


class Estimate(NamedTuple):
    """A number that was measured, with its standard error."""

    value: float
    standard_error: float


def effective_sample_size(log_weights: np.ndarray) -> float:
    """(Σ w)² / Σ w² of weights given by their logarithms (n,): between 1 and n (Kong 1992)."""
    return float(np.exp(2 * logsumexp(log_weights) - logsumexp(2 * log_weights)))


def log_mean_weight(log_weights: np.ndarray) -> Estimate:
    """log of the mean of n weights, its error by the delta method: sqrt(1 / ESS − 1 / n), which is the coefficient of
    variation of w over sqrt(n). Trust it where `pareto_k` is below TRUSTED_PARETO_K."""
    count = len(log_weights)
    variance = 1 / effective_sample_size(log_weights) - 1 / count
    return Estimate(float(logsumexp(log_weights) - np.log(count)), float(np.sqrt(max(variance, 0.0))))


def pareto_k(log_weights: np.ndarray) -> float:
    """Shape k̂ of the generalised Pareto law of the largest weights: the mean of w has a variance below 1/2 only.

    The tail is min(n / 5, 3 sqrt(n)) weights long, its shape is the posterior mean of Zhang & Stephens (2009) with the weak
    prior of Vehtari et al. (2024), as in PSIS. NaN where the tail has fewer than five weights, −inf where they are equal.
    """
    count = len(log_weights)
    length = int(min(count / 5, 3 * np.sqrt(count)))
    if length < _FEWEST_IN_TAIL:
        return float("nan")
    ordered = np.sort(log_weights)
    tail, cut = ordered[-length:], ordered[-length - 1]
    excesses = np.exp(tail - tail[-1]) - np.exp(cut - tail[-1])
    if excesses[-1] <= _EQUAL_WEIGHTS:
        return float("-inf")
    return (length * _generalised_pareto_shape(excesses) + 10 * 0.5) / (length + 10)


def _generalised_pareto_shape(excesses: np.ndarray) -> float:
    """k of a sorted sample (n,) of non-negative excesses, by the profile likelihood on a grid of scales."""
    count = len(excesses)
    size = 30 + int(np.sqrt(count))
    quartile = max(float(excesses[int(count / 4 + 0.5) - 1]), 1e-12 * float(excesses[-1]))
    grid = (1 - np.sqrt(size / (np.arange(1, size + 1) - 0.5))) / (3 * quartile) + 1 / excesses[-1]
    shapes = np.log1p(-grid[:, None] * excesses).mean(1)
    log_likelihoods = count * (np.log(-grid / shapes) - shapes - 1)
    posterior = np.exp(log_likelihoods - logsumexp(log_likelihoods))
    return float(np.log1p(-(posterior @ grid) * excesses).mean())


@dataclass(frozen=True)
class Paths:
    """What the certificate needs of paths of one kind, for one target."""

    log_tilts: np.ndarray
    """(n,) Σ_c (γ_c / β) log p̂_c(y_c|x_0)."""
    log_ratios: np.ndarray | None
    """(n,) log of the policy's density of the path over the pre-trained model's; None: not known (pre-trained paths)."""

    @property
    def log_weights(self) -> np.ndarray:
        """(n,) log w, of the target over the policy."""
        assert self.log_ratios is not None
        return self.log_tilts - self.log_ratios

    def __len__(self) -> int:
        return len(self.log_tilts)


def mixture_log_weights(paths: Paths, share: float) -> np.ndarray:
    """(n,) log weights of the target over a proposal with a share of pre-trained paths: ℓ − log(a + (1 − a) e^r).

    The same for paths of either kind (the balance heuristic of Veach & Guibas 1995); none is above ℓ − log a.
    """
    assert paths.log_ratios is not None and 0 < share < 1
    return paths.log_tilts - np.logaddexp(np.log(share), np.log1p(-share) + paths.log_ratios)


@dataclass(frozen=True)
class Certificate:
    """Of one target: a class, or a combination of them. Everything in nats but `ess`, a share, and `pareto_k`."""

    objective: Estimate
    """J / β, the mean of log w over the policy's paths."""
    log_z: Estimate
    """No sampler's objective is above it."""
    gap: Estimate
    """KL(policy's paths ‖ target's paths). What the pre-trained samples add to its error is the same for all policies."""
    lower: Estimate
    """E[log of the mean of 16 weights] ≤ log Z, and no less than the objective."""
    upper: Estimate | None
    """E_target[log w] ≥ log Z, by pre-trained paths weighted to the target; None: their log-ratio is not known."""
    ess: float
    """Effective sample size of the policy's paths, as a share of their number."""
    pareto_k: float
    """Of the policy's paths."""

    @property
    def too_wide(self) -> bool:
        """Whether bounds and weights say too little: they leave more room than the gap itself, or k̂ is not trusted."""
        loose = self.upper is not None and self.upper.value - self.lower.value > self.gap.value
        return loose or not self.pareto_k <= TRUSTED_PARETO_K


def certify(policy: Paths, pre_trained: Paths) -> Certificate:
    """The certificate of a policy for one target, from paths of its own and of the pre-trained model, two of each at least."""
    log_weights, count = policy.log_weights, len(policy)
    if pre_trained.log_ratios is None:
        return certify_targets(log_weights, np.zeros(count, dtype=np.int64), pre_trained.log_tilts[None])
    total = count + len(pre_trained)
    parts = [mixture_log_weights(paths, len(pre_trained) / total) for paths in (policy, pre_trained)]
    value = float(logsumexp(np.concatenate(parts)) - np.log(total))
    ours, theirs = (np.exp(part - value) for part in parts)  # 1 on average over both
    of_theirs = np.sqrt(len(pre_trained)) * np.std(theirs, ddof=1) / total
    log_z = Estimate(value, float(np.hypot(np.sqrt(count) * np.std(ours, ddof=1) / total, of_theirs)))
    # The policy's paths are in both terms of the gap.
    of_ours = np.sqrt(count) * np.std(ours / total - log_weights / count, ddof=1)
    upper = _tilted_mean(pre_trained.log_weights, pre_trained.log_tilts)
    return _certificate(log_weights, log_weights, log_z, float(np.hypot(of_ours, of_theirs)), upper)


def certify_targets(log_weights: np.ndarray, targets: np.ndarray, log_tilts: np.ndarray) -> Certificate:
    """The certificate of paths that were asked for different targets, such as all classes of a control: objective, log Z and
    gap are means over the paths.

    Weights are compared after division by the Z of their own target, where the mean of each is 1. The targets share the
    pre-trained samples, which the error of log Z knows.

    Args:
        log_weights: (n,) log w of paths of the policy, n ≥ 2.
        targets: (n,) int, the row of `log_tilts` that each was asked for.
        log_tilts: (targets, m) Σ_c (γ_c / β) log p̂_c(y_c|x_0) of samples of the pre-trained model, m ≥ 2.
    """
    log_zs = logsumexp(log_tilts, axis=1) - np.log(log_tilts.shape[1])
    shares = np.bincount(targets, minlength=len(log_tilts)) / len(targets)
    log_z = Estimate(float(shares @ log_zs), mean_standard_error(shares @ np.exp(log_tilts - log_zs[:, None])))
    relative = log_weights - log_zs[targets]
    error = float(np.hypot(mean_standard_error(relative), log_z.standard_error))
    return _certificate(log_weights, relative + log_z.value, log_z, error, None)


def label_targets(
    labels: np.ndarray, exponents: Mapping[str, float], class_log_probs: Mapping[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(targets (n,), log tilts (targets, m)) for `certify_targets`: one target for each combination of labels that occurs.

    Args:
        labels: (n, C) of the policy's samples; the number of a control's classes is its null label, which asks for nothing.
        exponents: γ / β of each control, in the order of the columns.
        class_log_probs: Control to (m, K), of samples of the pre-trained model.
    """
    combinations, targets = np.unique(labels, axis=0, return_inverse=True)
    return targets.reshape(-1), joint_log_tilts(combinations, exponents, class_log_probs)


def joint_log_tilts(
    combinations: np.ndarray, exponents: Mapping[str, float], class_log_probs: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Σ_c (γ_c / β) log p̂_c(y_c|x_0) of m samples for each of J combinations of labels, (J, m) float64.

    combinations: (J, C), in the order of `exponents`; the number of a control's classes is its null label. class_log_probs:
    Control to (m, K).
    """
    parts = zip(exponents.items(), combinations.T, strict=True)
    return sum(
        (exponent * with_null(class_log_probs[name])[:, labels].T for (name, exponent), labels in parts), np.zeros(())
    )


def certify_evaluation(
    before: EvaluationSamples, after: EvaluationSamples, controls: Mapping[str, ControlConfig], kl_coef: float
) -> dict[str, Any]:
    """The certificate of an evaluation, as `summary.json` holds it: overall, and under `certificate/CONTROL/CLASS` the same
    keys of the samples that ask for that class.

    log Z comes from the pre-trained model's samples, pooled over prompts: where p̂ depends on the prompt that is an upper
    bound of the mean of the prompts' own log Z, and so is the gap. Empty where the log-ratio or a control's beliefs were not
    measured; a class of which fewer than two samples were asked is left out.
    """
    if after.log_ratio is None or not all(name in after.class_log_probs for name in controls):
        return {}
    rows = np.arange(len(after))
    asked = [
        with_null(after.class_log_probs[name])[rows, after.labels[:, column]] for column, name in enumerate(controls)
    ]
    return certify_labels(
        after.log_ratio, after.labels, np.stack(asked, axis=1), controls, kl_coef, before.class_log_probs
    )


def certify_labels(
    log_ratios: np.ndarray,
    labels: np.ndarray,
    asked_log_probs: np.ndarray,
    controls: Mapping[str, ControlConfig],
    kl_coef: float,
    class_log_probs: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """`certify_evaluation` of paths by their numbers alone.

    Args:
        log_ratios: (n,) log of the policy's density of its path over the pre-trained model's.
        labels: (n, C) asked for, in the order of `controls`.
        asked_log_probs: (n, C) log p̂ of that class; 0 for a null label.
        controls: Their names, classes and guidance strengths.
        kl_coef: β; with 0 there is no target, and the answer is empty.
        class_log_probs: Control to (m, K), of samples of the pre-trained model.
    """
    known = all(name in class_log_probs for name in controls)
    if not known or kl_coef == 0 or min(len(log_ratios), *(len(class_log_probs[name]) for name in controls)) < 2:
        return {}
    exponents = exponents_of(controls, kl_coef)
    log_weights = asked_log_probs.astype(np.float64) @ np.array(list(exponents.values())) - log_ratios

    def certified(rows: np.ndarray) -> dict[str, Any]:
        targets, log_tilts = label_targets(labels[rows], exponents, class_log_probs)
        return certificate_summary(certify_targets(log_weights[rows], targets, log_tilts))

    found = certified(np.ones(len(labels), dtype=bool))
    for column, (name, control) in enumerate(controls.items()):
        for label, class_name in enumerate(control.class_names):
            rows = labels[:, column] == label
            if rows.sum() > 1:
                found[f"{CLASS_CERTIFICATE}{name}/{class_name}"] = certified(rows)
    return found


def certificate_summary(certificate: Certificate) -> dict[str, Any]:
    """Its numbers as `summary.json` holds them."""
    return {
        "objective": certificate.objective.value,
        "log_z": certificate.log_z.value,
        "gap": certificate.gap.value,
        "gap_standard_error": certificate.gap.standard_error,
        "ess": certificate.ess,
        "pareto_k": certificate.pareto_k,
        "bounds": [certificate.lower.value, None if certificate.upper is None else certificate.upper.value],
        "too_wide": certificate.too_wide,
    }


def exponents_of(controls: Mapping[str, ControlConfig], kl_coef: float) -> dict[str, float]:
    """γ / β of each control, by which the target raises its p̂."""
    return {name: control.guidance_strength / kl_coef for name, control in controls.items()}


def certificate_row(certificate: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of `certify_labels` by the names that trackers know: 'gap' and 'gap/CONTROL/CLASS'."""
    parts = {"": certificate} | {
        f"/{name.removeprefix(CLASS_CERTIFICATE)}": part
        for name, part in certificate.items()
        if name.startswith(CLASS_CERTIFICATE)
    }
    rows = {f"{key}{suffix}": part[key] for suffix, part in parts.items() for key in CERTIFICATE_METRICS if key in part}
    return {name: value for name, value in rows.items() if math.isfinite(value)}


def log_z_errors(
    controls: Mapping[str, ControlConfig], kl_coef: float, class_log_probs: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Standard error of log Z of every combination of classes, from the beliefs (m, K) about pre-trained samples."""
    combinations = np.array(list(itertools.product(*(range(control.num_classes) for control in controls.values()))))
    log_tilts = joint_log_tilts(combinations, exponents_of(controls, kl_coef), class_log_probs)
    return np.array([log_mean_weight(row).standard_error for row in log_tilts])


def with_null(class_log_probs: np.ndarray) -> np.ndarray:
    """(n, K + 1) float64: the null label asks for nothing, so its log-probability counts as 0."""
    return np.pad(class_log_probs.astype(np.float64), ((0, 0), (0, 1)))


def _certificate(
    log_weights: np.ndarray, comparable: np.ndarray, log_z: Estimate, gap_error: float, upper: Estimate | None
) -> Certificate:
    """comparable: the weights on the scale of `log_z`."""
    objective = Estimate(float(np.mean(log_weights)), mean_standard_error(log_weights))
    groups = comparable[: len(comparable) // GROUP_SIZE * GROUP_SIZE].reshape(-1, GROUP_SIZE)
    means = logsumexp(groups, axis=1) - np.log(GROUP_SIZE) if len(groups) > 1 else comparable
    return Certificate(
        objective=objective,
        log_z=log_z,
        gap=Estimate(log_z.value - objective.value, gap_error),
        lower=Estimate(float(np.mean(means)), mean_standard_error(means)),
        upper=upper,
        ess=effective_sample_size(comparable) / len(comparable),
        pareto_k=pareto_k(comparable),
    )


def _tilted_mean(values: np.ndarray, log_tilts: np.ndarray) -> Estimate:
    """Mean of `values` under the tilted law, by self-normalised weights; its error by the delta method."""
    shares = np.exp(log_tilts - logsumexp(log_tilts))
    mean = float(shares @ values)
    return Estimate(mean, float(np.sqrt(np.sum(shares**2 * (values - mean) ** 2))))
