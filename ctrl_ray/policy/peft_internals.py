"""What we need of peft that has no public interface."""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer


def switch_adapters(layers: Iterable[BaseTunerLayer], *, on: bool) -> None:
    """Let LoRA layers add their updates, or compute what the pre-trained layer does.

    Leans on `BaseTunerLayer._disable_adapters`: the public `enable_adapters` would also change which parameters require
    a gradient, and training switches between the two at every denoising step.
    """
    for layer in layers:
        layer._disable_adapters = not on
