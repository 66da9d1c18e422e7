"""What an image costs: calls that are counted, and seconds beside plain sampling in the same process.

Counters stand around policy and rewards and change nothing. Rows of the denoiser count once for each of their guidance
branches; a decode counts where the latents of an image go through the decoder, with its classification or without.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ctrl_ray.diffusion.steps import ModelOutput
from ctrl_ray.policy.protocol import Inputs, beside_reference, policy_for_latents

FEWEST_PAIRS, MOST_PAIRS = 3, 25


@dataclass
class Calls:
    """How often an image's parts were computed, in rows."""

    calls: int = 0
    """Of the denoiser, of whatever number of rows."""
    forwards: int = 0
    """Rows of the denoiser."""
    backwards: int = 0
    """Rows that a gradient went back through."""
    decodes: int = 0
    """Latents that were decoded."""
    decode_backwards: int = 0
    """Of them, those with a gradient of the classifiers' log-probability."""

    def per_image(self, images: int) -> dict[str, float]:
        """Each of them over a number of images; `calls` as it is."""
        return {name: value if name == "calls" else value / images for name, value in dataclasses.asdict(self).items()}


class CountedPolicy:
    """A `Policy` that tells `calls` what it computes."""

    def __init__(self, policy: Any, calls: Calls) -> None:
        self._policy, self._calls = policy, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def __call__(self, latents: Tensor, time: Tensor, inputs: Inputs, *, reference: bool) -> ModelOutput:
        """See `Policy`."""
        rows = len(latents) * inputs.guidance.num_branches
        self._calls.calls += 1
        self._calls.forwards += rows
        output: ModelOutput = self._policy(latents, time, inputs, reference=reference)
        if output.prediction.requires_grad:
            output.prediction.register_hook(lambda gradient: self._went_back(rows))
        return output

    @property
    def for_latents(self) -> CountedPolicy:
        """See `policy_for_latents`."""
        return CountedPolicy(policy_for_latents(self._policy), self._calls)

    def beside_reference(self, inputs: Inputs) -> Inputs | None:
        """See `policy.protocol.beside_reference`."""
        return beside_reference(self._policy, inputs)

    def _went_back(self, rows: int) -> None:
        self._calls.backwards += rows


class CountedRewards:
    """Rewards that tell `calls` what they compute."""

    def __init__(self, rewards: Any, calls: Calls) -> None:
        self._rewards, self._calls = rewards, calls

    def __getattr__(self, name: str) -> Any:
        return getattr(self._rewards, name)

    def submit(self, latents: Tensor, prompts: Sequence[str], labels: Tensor, weights: Tensor) -> Any:
        """See `Rewards`."""
        self._calls.decodes += len(latents)
        self._calls.decode_backwards += len(latents)
        return self._rewards.submit(latents, prompts, labels, weights)

    def class_log_probs(self, inputs: Tensor, prompts: Sequence[str]) -> Any:
        """See `Rewards`; images are not decoded again."""
        self._calls.decodes += len(inputs) if inputs.is_floating_point() else 0
        return self._rewards.class_log_probs(inputs, prompts)

    def decode(self, latents: Tensor) -> Any:
        """See `Rewards`."""
        self._calls.decodes += len(latents)
        return self._rewards.decode(latents)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an image of one setting costs."""

    seconds: float
    """Median over the pairs."""
    plain_seconds: float
    """Of an image of plain sampling, beside it."""
    ratio: float
    """Median of the pairs' ratios: how many plain samples an image costs."""
    ratio_range: tuple[float, float]
    """Lowest and highest of them."""
    num_pairs: int
    batch_size: int
    calls: dict[str, float]
    """`Calls.per_image`."""


def timed_pairs(
    method: Callable[[], None],
    plain: Callable[[], None],
    images: int,
    calls: Calls,
    *,
    long_enough_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """Time a method and plain sampling in turn, each of `images` images; what is counted is that of the first method's.

    Each runs once before, for caches and allocators; where that alone takes the method long_enough_s, it is the first pair, and
    the only one. After so many seconds no further pair is begun, once there are FEWEST_PAIRS. The order changes from pair to
    pair.
    """

    def seconds(run: Callable[[], None]) -> float:
        start = clock()
        run()
        return clock() - start

    plain()
    first = seconds(method)
    counted = calls.per_image(images)
    if first > long_enough_s:
        pairs = [(first, seconds(plain))]
    else:
        pairs, began = [], clock()
        while len(pairs) < FEWEST_PAIRS or (len(pairs) < MOST_PAIRS and clock() - began < long_enough_s):
            order = (method, plain) if len(pairs) % 2 == 0 else (plain, method)
            took = {run: seconds(run) for run in order}
            pairs.append((took[method], took[plain]))
    ratios = [ours / theirs for ours, theirs in pairs]
    return Cost(
        seconds=statistics.median(ours for ours, _ in pairs) / images,
        plain_seconds=statistics.median(theirs for _, theirs in pairs) / images,
        ratio=statistics.median(ratios),
        ratio_range=(min(ratios), max(ratios)),
        num_pairs=len(pairs),
        batch_size=images,
        calls=counted,
    )
