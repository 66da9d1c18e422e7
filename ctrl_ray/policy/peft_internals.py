"""What we need of peft that has no public interface."""

from __future__ import annotations

from collections.abc import Iterable

from peft.tuners.tuners_utils import BaseTunerLayer


def switch_adapter(layers: Iterable[BaseTunerLayer], name: str, *, on: bool, scale: float) -> None:
    """Let one adapter of LoRA layers add its updates (at `scale` times its alpha / rank), or not.

    Where it is alone, the layer computes what the pre-trained one does when it is off, bit for bit. Leans on
    `BaseTunerLayer._disable_adapters`: the public `enable_adapters` would also change which parameters require a gradient,
    and training switches between the two at every denoising step. Others beside it stay as they are.
    """
    for layer in layers:
        if len(layer.scaling) == 1:
            layer._disable_adapters = not on
        else:
            layer.scaling[name] = layer.lora_alpha[name] / layer.r[name] * scale if on else 0.0
