"""One power of two for the cotangents that go back through a denoiser in fp16."""

from __future__ import annotations

import torch
from torch import Tensor

_EXPONENT = 0x7F800000
"""The exponent's bits of a float32; all of them set: infinite or NaN."""
_ONE = 127 << 23
"""1.0 as bits."""
_LARGEST = 100 << 23
"""The scale lies between 2^-100 and 2^100."""


class CotangentScale:
    """A scale S that cotangents are multiplied by where they enter the denoiser and divided by where they leave it.

    fp16 has no numbers below 6e-8, and cotangents are smaller: each is divided by the batch, and by the steps' deviations.
    Back-propagation is linear in the cotangent and S is a power of two, so in float32 nothing changes, to the bit. S brings
    the largest magnitude of the first cotangent that enters to [1, 2), and serves all that enter until it is forgotten:
    one graph may hold several forwards, and what a parameter gets from them is summed before it can be divided. Nothing
    waits for the device. The methods are gradient hooks (`Tensor.register_hook`).
    """

    def __init__(self) -> None:
        self._scale: Tensor | None = None

    def forget(self) -> None:
        """The next cotangent that enters chooses the scale."""
        self._scale = None

    def enter(self, cotangent: Tensor) -> Tensor:
        """S · cotangent, of the denoiser's output."""
        found = _inverse_magnitude(cotangent)
        # a cotangent of zeros chooses nothing (0): any scale suits it
        self._scale = found if self._scale is None else torch.where(self._scale > 0, self._scale, found)
        return cotangent * self._chosen()

    def leave(self, cotangent: Tensor) -> Tensor:
        """cotangent / S, of the denoiser's input or of a parameter."""
        return cotangent / self._chosen()

    def _chosen(self) -> Tensor:
        assert self._scale is not None, "a gradient came out of the denoiser before a cotangent went in"
        return torch.where(self._scale > 0, self._scale, torch.ones_like(self._scale))


def _inverse_magnitude(cotangent: Tensor) -> Tensor:
    """Scalar 2^-e of the largest magnitude, in [2^e, 2^(e+1)); 0 where all are 0, and 1 where one is infinite or NaN (the
    checks of the adjoint pass shall find it)."""
    largest = cotangent.detach().abs().amax().float()
    exponent = largest.view(torch.int32) & _EXPONENT
    scale = (2 * _ONE - exponent.clamp(_ONE - _LARGEST, _ONE + _LARGEST)).view(torch.float32)
    scale = torch.where(exponent == _EXPONENT, torch.ones_like(scale), scale)
    return torch.where(largest == 0, torch.zeros_like(scale), scale)
