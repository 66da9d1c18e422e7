"""From clean latents to what a call gives back, and whether that is a picture at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctrl_ray.config import Precision
from ctrl_ray.errors import ConfigError, NonFiniteError
from ctrl_ray.policy.decoder import LatentDecoder, to_uint8

OutputType = Literal["pil", "np", "pt", "latent"]
"""PIL images, an array (B, H, W, 3), a tensor (B, 3, H, W), the latents (B, C, h, w)."""


def check_output_type(output_type: str) -> None:
    """ConfigError for one that is unknown."""
    known = get_args(OutputType)
    if output_type not in known:
        raise ConfigError(f"output_type {output_type!r} is unknown; expected one of {', '.join(known)}")


def finished(
    latents: Tensor,
    decoder: Callable[[], LatentDecoder],
    output_type: OutputType,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int | None],
    precision: Precision,
    warn_frame: int,
) -> Any:
    """The images of clean latents (B, C, h, w), as `output_type` says.

    decoder: asked for unless latents are wanted. prompts, seeds: what the images came from, for messages. precision: the
    denoiser's. warn_frame: how many frames above this one a warning points to. NonFiniteError where latents or images are
    NaN or infinite; a warning where an image is black.
    """
    require_finite("latents", latents, prompts, seeds, precision)
    if output_type == "latent":
        return latents
    images = decoder().decode(latents)
    require_finite("decoded images", images, prompts, seeds, "fp32")
    arrays = to_uint8(images).cpu().numpy()
    black = black_rows(arrays)
    if black:
        names = [f"image {row}" for row in black]
        warnings.warn(black_text(names, len(arrays)), UserWarning, stacklevel=1 + warn_frame)
    if output_type == "pt":
        return images
    if output_type == "np":
        return np.asarray(images.permute(0, 2, 3, 1).cpu().numpy())
    return [Image.fromarray(array) for array in arrays]


def require_finite(
    what: str, values: Tensor, prompts: Sequence[str], seeds: Sequence[int | None], precision: Precision
) -> None:
    """NonFiniteError where numbers (B, ...) are NaN or infinite; it names the first image, its prompt and seed, what to try.

    what: 'latents' or 'decoded images'.
    """
    bad = (~torch.isfinite(values)).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    if not bad:
        return
    first = bad[0]
    prompt = prompts[first] if len(prompts[first]) <= 80 else f"{prompts[first][:77]}…"
    seed = "" if seeds[first] is None else f", seed {seeds[first]}"
    tries = "a smaller adapter_scale or guidance_scale, or another checkpoint of the adapter"
    if precision in ("fp16", "bf16"):
        tries = f"precision fp32 (it is {precision}{', whose numbers end at 65504' if precision == 'fp16' else ''}), or {tries}"
    raise NonFiniteError(
        f"the {what} of {len(bad)} of {len(values)} images are not finite, first of image {first} (prompt {prompt!r}{seed}); "
        f"none of them is written. Try {tries}"
    )


def black_rows(images: np.ndarray) -> list[int]:
    """Which of the images (B, H, W, 3), uint8, have no pixel above 0."""
    return [row for row, image in enumerate(images) if not image.any()]


def black_text(black: Sequence[str], count: int) -> str:
    """What to tell of pictures that are black. black: what each is called; count: of how many."""
    more = f" and {len(black) - 3} more" if len(black) > 3 else ""
    return (
        f"{len(black)} of {count} images are black, every pixel is 0: {', '.join(black[:3])}{more}. The denoiser or the VAE "
        "makes numbers that are too large; try precision fp32, a smaller adapter_scale or guidance_scale, or another base model"
    )
