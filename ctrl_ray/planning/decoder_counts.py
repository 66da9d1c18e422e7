"""What decoding latents takes, counted without the VAE's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ctrl_ray.planning.live_bytes import LiveBytes, as_fake_cpu
from ctrl_ray.policy.backbones import Backbone


@dataclass(frozen=True, kw_only=True)
class DecoderCounts:
    """Of a base model's VAE in float32. Classifiers, which see the decoded images, are not in it."""

    weights: int
    """Bytes."""
    with_gradient: int
    """The most bytes that are alive while one image is decoded and its gradient at the latents is taken. A chunk of
    several images takes so many times as much."""
    without_gradient: int
    """The same without the gradient."""
    operations: float
    """Floating-point operations of decoding one image and taking its gradient."""


def count_decoder(backbone: Backbone) -> DecoderCounts:
    """Run the VAE's decoder on fake tensors, for one image of the size that the model was trained for."""
    decoder = backbone.load_decoder(1, empty=True)
    with FakeTensorMode(), LiveBytes() as live:
        as_fake_cpu(decoder)
        latents = torch.zeros(1, *backbone.latent_shape)
        start = live.restart_peak()
        with torch.no_grad():
            decoder.decode(latents)
        without = live.peak - start
        latents.requires_grad_()
        start, live.operations = live.restart_peak(), 0.0
        decoder.decode(latents).sum().backward()
        peak = live.peak - start
    return DecoderCounts(
        weights=sum(p.numel() * p.element_size() for p in decoder.parameters()),
        with_gradient=peak,
        without_gradient=without,
        operations=live.operations,
    )
