"""What is no picture: numbers that are not finite, pixels that are all black; and devices that are not here."""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrl_ray.config import Precision
from ctrl_ray.errors import ConfigError, NonFiniteError
from ctrl_ray.policy import device as devices
from ctrl_ray.policy.device import check_device, devices_here
from ctrl_ray.policy.outputs import black_rows, black_text, finished


class _Decoder:
    """Latents (B, 3, h, w) are the pixels."""

    def decode(self, latents: Tensor) -> Tensor:
        return latents.reciprocal() if latents.max() > 1 else latents


def _finished(latents: Tensor, output_type: Any = "pil", precision: Precision = "fp16") -> Any:
    prompts = ["a cat", "b" * 200, "a dog"]
    decoder: Any = _Decoder()
    return finished(
        latents,
        lambda: decoder,
        output_type,
        prompts=prompts,
        seeds=[7, 8, None],
        precision=precision,
        warn_frame=1,
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("output_type", ["pil", "pt", "latent"])
def test_latents_that_are_not_finite(bad: float, output_type: str) -> None:
    latents = torch.full((3, 3, 2, 2), 0.5)
    latents[1, 0, 0, 0] = latents[2] = bad
    message = (
        f"the latents of 2 of 3 images are not finite, first of image 1 (prompt '{'b' * 77}…', seed 8); none of them is "
        "written. Try precision fp32 (it is fp16, whose numbers end at 65504), or a smaller adapter_scale or guidance_scale, or"
    )
    with pytest.raises(NonFiniteError, match=re.escape(message)):
        _finished(latents, output_type)
    with pytest.raises(NonFiniteError, match=r"\(prompt 'b+…', seed 8\); none of them is written\. Try a smaller"):
        _finished(latents, output_type, "fp32")


def test_images_that_are_not_finite() -> None:
    latents = torch.full((3, 3, 2, 2), 2.0)
    latents[2, 0] = 0  # whose reciprocal is infinite
    with pytest.raises(NonFiniteError, match=r"the decoded images of 1 of 3 .* image 2 \(prompt 'a dog'\)"):
        _finished(latents)


def test_black_images_are_told_of() -> None:
    """All pixels, after rounding; one pixel that is not black is a picture."""
    latents = torch.zeros(3, 3, 2, 2)
    latents[0] = 0.0019  # rounds to 0
    latents[2, 1, 0, 0] = 0.0021
    with pytest.warns(
        UserWarning, match="2 of 3 images are black, every pixel is 0: image 0, image 1. The denoiser"
    ) as told:
        images = _finished(latents)
    assert [np.asarray(image).max() for image in images] == [0, 0, 1] and told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _finished(latents, "latent")
    assert black_rows(np.zeros((2, 1, 1, 3), np.uint8)) == [0, 1]
    assert ": a, b, c and 2 more. " in black_text(list("abcde"), 9)


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:1", "mps", "meta", "cpu:x", "", torch.device("cuda", 3)])
def test_a_device_that_is_not_here(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "devices_here", lambda: ["cpu"])
    with pytest.raises(
        ConfigError, match=rf"^device {str(device)!r} is (not here|not known to torch); expected one of cpu$"
    ):
        check_device(device)


def test_devices_that_are_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices_here()[0] == "cpu" and check_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert devices_here() == ["cpu", "cuda:0", "cuda:1"]
    assert check_device("cuda").type == "cuda" and check_device("cuda:1").index == 1
    with pytest.raises(ConfigError, match="device 'cuda:2' is not here; expected one of cpu, cuda:0, cuda:1"):
        check_device("cuda:2")
