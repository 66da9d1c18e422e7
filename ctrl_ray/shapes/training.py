"""Drawn images as tensors, the loop that all stages of `ctrl_ray.shapes.make` train with, and one augmentation."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrl_ray.offline.shapes import draw_dataset

Model = TypeVar("Model", bound=nn.Module)


def draw_tensors(num_images: int, seed: int) -> tuple[Tensor, list[str]]:
    """Drawn images as uint8 (N, 3, 64, 64), and their prompts."""
    drawn = list(draw_dataset(num_images, seed))
    pixels = np.stack([np.asarray(image) for image, _ in drawn])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), [prompt for _, prompt in drawn]


def to_model_range(images: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def train(
    modules: Model,
    loss_of: Callable[[], Tensor],
    *,
    num_updates: int,
    learning_rate: float,
    ema_decay: float,
    name: str,
    save: Callable[[Model], None] | None = None,
    save_every: int = 0,
) -> tuple[Model, list[list[float]]]:
    """Minimise `loss_of()` over the parameters of `modules` with AdamW, a short warm-up and a cosine decay to zero.

    Returns:
        The exponential moving average of `modules`, and rows (update, mean loss since the last row).
    """
    parameters: list[Tensor] = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    warm_up = min(100, num_updates // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda u: min(1.0, (u + 1) / (warm_up + 1)) * 0.5 * (1 + math.cos(math.pi * u / num_updates))
    )
    ema = copy.deepcopy(modules).eval().requires_grad_(False)
    ema_parameters: list[Tensor] = [
        e for e, p in zip(ema.parameters(), modules.parameters(), strict=True) if p.requires_grad
    ]
    curve: list[list[float]] = []
    total, start = 0.0, time.monotonic()
    for update in range(num_updates):
        loss = loss_of()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        decay = min(ema_decay, (1 + update) / (10 + update))
        with torch.no_grad():
            torch._foreach_lerp_(ema_parameters, parameters, 1.0 - decay)
        total += float(loss.detach())
        if (update + 1) % 50 == 0:
            curve.append([update + 1, total / 50])
            print(
                f"{name} {update + 1}/{num_updates} loss {total / 50:.5f} {time.monotonic() - start:.0f} s", flush=True
            )
            total = 0.0
        if save is not None and save_every and (update + 1) % save_every == 0:
            save(ema)
    return ema, curve


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A Gaussian blur of standard deviation up to 1.2 px (one draw per batch), brightness and noise per image."""
    sigma = 0.05 + 1.15 * torch.rand((), generator=generator).item()
    kernel = torch.exp(-0.5 * (torch.arange(-3, 4) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).repeat(3, 1, 1)
    blurred = F.conv2d(F.pad(images, (3, 3, 3, 3), mode="replicate"), kernel[:, :, None, :], groups=3)
    blurred = F.conv2d(blurred, kernel[:, :, :, None], groups=3)
    per_image = torch.rand(2, len(images), 1, 1, 1, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    return (blurred * (0.85 + 0.3 * per_image[0]) + 0.06 * per_image[1] * noise).clamp(0.0, 1.0)


def train_denoiser(
    modules: nn.ModuleDict,
    loss_of: Callable[[], Tensor],
    save: Callable[[nn.ModuleDict], None],
    *,
    num_updates: int,
    learning_rate: float,
    name: str,
) -> dict[str, Any]:
    """`train` a denoiser and what goes with it, and save its average; the curve, and the number of parameters of each."""
    ema, curve = train(
        modules,
        loss_of,
        num_updates=num_updates,
        learning_rate=learning_rate,
        ema_decay=0.999,
        name=name,
        save=save,
        save_every=1000,
    )
    save(ema)
    return {
        "curve": curve,
        "parameters": {part: sum(p.numel() for p in module.parameters()) for part, module in ema.items()},
    }
