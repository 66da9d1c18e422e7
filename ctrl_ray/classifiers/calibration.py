"""How far a classifier's probabilities can be trusted: temperature scaling, calibration metrics, a diagram."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctrl_ray.errors import DataError, NonFiniteError

NUM_BINS = 15
"""Equal-width bins of the top label's probability in the expected calibration error."""

_MAX_NEWTON_STEPS = 100
_LOG_TEMPERATURE_BOUND = 5.0
COOLEST, HOTTEST = math.exp(-_LOG_TEMPERATURE_BOUND), math.exp(_LOG_TEMPERATURE_BOUND)
"""The limits of a fitted temperature."""

_LIKELY_NATS = 1.92
"""Half of the 95 % quantile of chi-square with one degree of freedom: how many nats of all rows together a temperature may
fit worse than the best one and still be within the 95 % likelihood interval."""
_DETERMINED_FACTOR = 2.0
_BISECTIONS = 24


class Temperature(NamedTuple):
    """A temperature, and what the held-out rows say about it."""

    best: float
    """Minimises their NLL, within the limits."""
    low: float
    high: float
    """The 95 % likelihood interval around it, cut at the limits."""
    num_rows: int
    num_errors: int
    """Rows whose most probable class is not the label."""

    @property
    def is_determined(self) -> bool:
        """Whether the rows place it within a factor of 2 on either side, off the limits."""
        within = self.low > COOLEST and self.high < HOTTEST
        return within and self.best <= self.low * _DETERMINED_FACTOR and self.high <= self.best * _DETERMINED_FACTOR

    @property
    def value(self) -> float:
        """What logits are divided by: `best` where it is determined, else 1.

        Rows without errors fit every lower temperature better, and rows of which the logits know nothing every higher one: a
        stop short of the limits would be the search's choice, not the rows'. 1 leaves the network as its loss made it.
        """
        return self.best if self.is_determined else 1.0


class Bins(NamedTuple):
    """A reliability diagram as numbers, one per bin; confidence and accuracy are 0 in an empty bin."""

    counts: Tensor
    confidence: Tensor
    accuracy: Tensor


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature T > 0 that minimises the mean NLL of softmax(logits / T) (Guo et al., ICML 2017).

    With p = softmax(b z) the NLL is convex in the inverse temperature b = 1 / T; its slope is E[mean_p(z) - z_y], its
    curvature E[var_p(z)]: a bracketed Newton iteration in float64. T stays in [e^-5, e^5], because no T is optimal
    where every label is the top one.

    Args:
        logits: (N, K), finite.
        labels: (N,) int64 in [0, K).

    Raises:
        DataError: No rows.
        NonFiniteError: A logit is NaN or infinite.
    """
    if len(labels) == 0:
        raise DataError("the temperature split holds no rows; expected at least one, give more data or a larger share")
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError("a logit of the temperature split is NaN or infinite; lower classifier.learning_rate")
    z, target = logits.double(), labels.long()
    picked = z.gather(1, target[:, None])[:, 0]
    low, high = COOLEST, HOTTEST
    inverse = 1.0
    for _ in range(_MAX_NEWTON_STEPS):
        p = torch.softmax(inverse * z, dim=1)
        mean = (p * z).sum(1)
        slope = float((mean - picked).mean())
        curvature = float((p * (z - mean[:, None]).square()).sum(1).mean())
        low, high = (inverse, high) if slope < 0 else (low, inverse)
        step = inverse - slope / curvature if curvature > 0 else math.inf
        following = step if low < step < high else math.sqrt(low * high)
        if abs(following - inverse) <= 1e-12 * inverse:
            break
        inverse = following
    return 1.0 / inverse


def measure_temperature(logits: Tensor, labels: Tensor) -> Temperature:
    """`fit_temperature` with its 95 % likelihood interval {T : N (NLL(T) - NLL(best)) <= 1.92}, N rows.

    Unlike a standard error, the interval is right where there are few errors, and it has no end below where there are none.
    """
    best = fit_temperature(logits, labels)
    z, target = logits.double(), labels.long()

    def nats(temperature: float) -> float:
        return float(F.cross_entropy(z / temperature, target, reduction="sum"))

    highest = nats(best) + _LIKELY_NATS

    def end(limit: float) -> float:
        inside, outside = math.log(best), math.log(limit)
        if nats(limit) <= highest:
            return limit
        for _ in range(_BISECTIONS):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if nats(math.exp(middle)) <= highest else (inside, middle)
        return math.exp(inside)

    num_errors = int((logits.argmax(1) != target).sum())
    return Temperature(best, end(COOLEST), end(HOTTEST), len(target), num_errors)


def reliability_bins(log_probs: Tensor, labels: Tensor, num_bins: int = NUM_BINS) -> Bins:
    """Rows by the probability of their top label, in `num_bins` bins ((i / n, (i + 1) / n], 0 in the first)."""
    confidence, predicted = log_probs.double().exp().max(dim=1)
    index = (confidence * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)
    counts = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, index, torch.ones_like(confidence))
    right = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, index, (predicted == labels).double())
    total = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, index, confidence)
    return Bins(counts.long(), total / counts.clamp(min=1), right / counts.clamp(min=1))


def calibration_metrics(log_probs: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, NLL, Brier score and ECE of log-probabilities (N, K) against labels (N,).

    - `accuracy`: share of rows whose most probable class is the label.
    - `nll`: mean -log p(label), in nats.
    - `brier`: mean over rows of Σ_k (p_k - 1{k = label})², in [0, 2].
    - `ece`: Σ_bins (rows in bin / N) |accuracy - mean confidence|, over `NUM_BINS` equal-width bins of the top label's
      probability.
    """
    if len(labels) == 0:
        raise DataError("calibration metrics need at least one row, got none")
    log_p = log_probs.detach().cpu().double()
    target = labels.detach().cpu().long()
    one_hot = F.one_hot(target, log_p.shape[1]).double()
    bins = reliability_bins(log_p, target)
    gaps = (bins.accuracy - bins.confidence).abs()
    return {
        "accuracy": float((log_p.argmax(1) == target).double().mean()),
        "nll": float(F.nll_loss(log_p, target)),
        "brier": float((log_p.exp() - one_hot).square().sum(1).mean()),
        "ece": float((bins.counts * gaps).sum() / len(target)),
    }


def reliability_diagram(
    path: str | Path,
    before: Tensor,
    after: Tensor,
    labels: Tensor,
    *,
    title: str = "",
    classes: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
) -> None:
    """Write a PNG: accuracy against confidence before and after scaling, with the number of rows in each bin.

    Args:
        path: The PNG to write.
        before: Log-probabilities (N, K) before temperature scaling.
        after: The same after it.
        labels: (N,).
        title: Heading.
        classes: Names of the classes; named in the heading.
        say: Gets the line about letters that no font has (`canvas.new_figure`).
    """
    from ctrl_ray.canvas import new_figure, shortened

    heading = ", ".join([part for part in (title, f"{len(labels)} rows", " | ".join(classes)) if part])
    with new_figure(Path(path), 8, 5.2, say=say) as figure:
        axes = figure.subplots(2, 2, sharex=True, height_ratios=(3, 1))
        for column, (name, log_probs) in enumerate((("before scaling", before), ("after scaling", after))):
            _draw_reliability(axes[0][column], axes[1][column], name, log_probs, labels)
        axes[0][0].set_ylabel("share that is right")
        axes[1][0].set_ylabel("rows")
        axes[0][0].legend(loc="upper left")
        figure.suptitle(shortened(heading, 110), fontsize=10)


def _draw_reliability(top: Any, bottom: Any, name: str, log_probs: Tensor, labels: Tensor) -> None:
    from ctrl_ray.canvas import AFTER, BEFORE, INK

    centres = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    metrics = calibration_metrics(log_probs, labels)
    counts, confidence, accuracy = (part.numpy() for part in reliability_bins(log_probs.cpu(), labels.cpu()))
    filled = counts > 0
    top.plot((0, 1), (0, 1), color=BEFORE, linestyle="--", linewidth=1, label="perfectly calibrated")
    top.bar(centres[filled], accuracy[filled], 0.9 / NUM_BINS, color=AFTER, alpha=0.7, label="accuracy")
    top.plot(confidence[filled], accuracy[filled], "o", color=INK, ms=4, label="mean confidence")
    top.set(title=f"{name}: ECE {metrics['ece']:.4f}, NLL {metrics['nll']:.4f}", xlim=(0, 1), ylim=(0, 1.02))
    bottom.bar(centres, counts, width=0.9 / NUM_BINS, color=BEFORE)
    bottom.set(xlabel="probability of the most probable class", ylim=(0, float(counts.max()) * 1.35))
    for x, count in zip(centres.tolist(), counts.tolist(), strict=True):
        if count:
            bottom.annotate(str(count), (x, count), ha="center", va="bottom", fontsize=6)
