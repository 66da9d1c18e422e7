"""p(y|x_t, t): a classifier of noised latents, which classifier guidance needs (Dhariwal & Nichol 2021).

It sees latents instead of images, so it asks no VAE; and it must know every noise level, so it is fitted on labelled images at
all of them (`baselines.noised_fit`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrl_ray.classifiers import stored
from ctrl_ray.classifiers.classifier import SETTINGS as CLEAN
from ctrl_ray.classifiers.networks import ClassHead, HashedText
from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import ModelError

SETTINGS = "noised_classifier.json"
LAYOUT = stored.Layout(
    "noised classifier folder",
    SETTINGS,
    "python -m ctrl_ray.classify --noised",
    {"latent_shape": tuple[int, ...], "network_arguments": dict, "base_model": str},
    {"held_out": dict | None, "vae": str | None},
)
_NUM_FREQUENCIES = 32
_COARSEST = 8
"""Side in latent pixels up to which an image is halved."""


class _Block(nn.Module):
    """A residual block that the noise level (and the prompt) scales and shifts; it is the identity at first."""

    def __init__(self, width: int, num_conditions: int) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Linear(num_conditions, 2 * width)
        nn.init.zeros_(self.second.weight)

    def forward(self, hidden: Tensor, condition: Tensor) -> Tensor:
        """(B, width, h, w) to the same; condition (B, num_conditions)."""
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        inner = self.first(F.gelu(self.first_norm(hidden)))
        inner = self.second_norm(inner) * (1 + scale) + shift
        return hidden + self.second(F.gelu(inner))


class NoisedNetwork(nn.Module):
    """Logits of noised latents: residual blocks at each resolution, averaged over the image.

    Args:
        num_classes: Number of logits.
        channels: Of the latents.
        widths: Channels at each resolution, multiples of 8; each is half the one before.
        num_condition_features: Width of the timestep's embedding.
        prompt_conditional: Whether `forward` needs prompts.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        channels: int,
        widths: Sequence[int],
        num_condition_features: int = 128,
        prompt_conditional: bool = False,
    ) -> None:
        super().__init__()
        self.time = nn.Sequential(
            nn.Linear(2 * _NUM_FREQUENCIES, num_condition_features),
            nn.GELU(),
            nn.Linear(num_condition_features, num_condition_features),
        )
        self.text = HashedText(num_condition_features) if prompt_conditional else None
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList(_Block(width, num_condition_features) for width in widths)
        self.halve = nn.ModuleList(nn.Conv2d(a, b, 2, stride=2) for a, b in zip(widths, widths[1:]))
        self.head = ClassHead(widths[-1], num_classes)

    def forward(self, latents: Tensor, timestep: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Logits (B, num_classes) of latents (B, C, h, w) at timesteps (B,)."""
        condition = self.time(_time_features(timestep))
        if self.text is not None and prompts is not None:
            condition = condition + self.text(prompts)
        condition = F.gelu(condition)
        hidden = self.stem(latents)
        for level, block in enumerate(self.blocks):
            hidden = block(hidden if level == 0 else self.halve[level - 1](hidden), condition)
        return self.head(F.gelu(hidden).mean((2, 3)))


def _time_features(timestep: Tensor) -> Tensor:
    """Sines and cosines of timesteps (B,) with periods from 2π to 20000π, (B, 2 · _NUM_FREQUENCIES)."""
    exponents = torch.arange(_NUM_FREQUENCIES, device=timestep.device) / (_NUM_FREQUENCIES - 1)
    angles = timestep.float()[:, None] * torch.exp(-math.log(10_000) * exponents)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class NoisedClassifier(nn.Module):
    """p(y|x_t, t) of one control.

    Args:
        network: Logits (B, K) of noised latents, timesteps and prompts.
        arguments: What builds the network again, beside its number of classes.
        control: Name of the control.
        spec: Its classes, thresholds, unit and oracle; K is `spec.num_classes`.
        latent_shape: (C, h, w) that it was fitted on.
        base_model: Whose latents and noise schedule these are.
        held_out: Figures on held-out images by noise level (`noised_fit.held_out_figures`).
        vae: SHA-256 of the VAE that encoded them (`policy.identity`); None: not known.
    """

    def __init__(
        self,
        network: NoisedNetwork,
        *,
        arguments: Mapping[str, Any],
        control: str,
        spec: ControlConfig,
        latent_shape: Sequence[int],
        base_model: str,
        held_out: Mapping[str, Any] | None = None,
        vae: str | None = None,
    ) -> None:
        super().__init__()
        self.network, self.arguments = network, dict(arguments)
        self.control, self.spec = control, spec
        self.latent_shape, self.base_model = tuple(latent_shape), base_model
        self.held_out, self.vae = dict(held_out or {}), vae

    @classmethod
    def new(
        cls,
        control: str,
        spec: ControlConfig,
        *,
        latent_shape: Sequence[int],
        base_model: str,
        prompt_conditional: bool = False,
        vae: str | None = None,
    ) -> NoisedClassifier:
        """One with random weights. It halves images until a side has at most 8 latent pixels, at least once."""
        channels, side = latent_shape[0], min(latent_shape[1:])
        num_halvings = max(1, math.ceil(math.log2(side / _COARSEST)))
        arguments: dict[str, Any] = {
            "channels": channels,
            "widths": [64, *[128] * num_halvings],
            "prompt_conditional": prompt_conditional,
        }
        network = NoisedNetwork(spec.num_classes, **arguments)
        return cls(
            network,
            arguments=arguments,
            control=control,
            spec=spec,
            latent_shape=latent_shape,
            base_model=base_model,
            vae=vae,
        )

    def forward(self, latents: Tensor, timestep: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """log p(y|x_t, t), (B, K) float32, of latents (B, C, h, w) and a scheduler's timestep, a scalar or (B,).

        Differentiable in the latents. Raises ModelError for latents with other channels, and without prompts where it depends
        on them.
        """
        if latents.dim() != 4 or latents.shape[1] != self.latent_shape[0]:
            raise ModelError(
                f"the noised classifier of control {self.control!r} takes latents of shape (B, {self.latent_shape[0]}, h, w), "
                f"those of base model {self.base_model!r}; got {tuple(latents.shape)}; fit one for this base model with "
                f"`{LAYOUT.command}`"
            )
        if self.network.text is not None and (prompts is None or len(prompts) != len(latents)):
            got = "none" if prompts is None else str(len(prompts))
            raise ModelError(
                f"the noised classifier of control {self.control!r} depends on the prompt: expected {len(latents)} prompts, "
                f"one for each image, got {got}"
            )
        return torch.log_softmax(self.network(latents.float(), timestep.expand(len(latents)), prompts), dim=1)

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `noised_classifier.json` into `folder`."""
        more = {
            "network_arguments": self.arguments,
            "latent_shape": self.latent_shape,
            "base_model": self.base_model,
            "held_out": self.held_out,
            "vae": self.vae,
        }
        stored.write_folder(folder, LAYOUT, self.network, self.control, self.spec, more)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, control: str | None = None, device: str | torch.device = "cpu"
    ) -> NoisedClassifier:
        """The classifier that `save` wrote, frozen and in eval mode. control: whose it must be; None: any's.

        Raises ModelError for a folder that is something else, the classifier of another control, or a wrong number of outputs.
        """
        path = Path(folder)
        if not (path / SETTINGS).is_file() and (path / CLEAN).is_file():
            raise ModelError(
                f"noised classifier folder {path} holds a classifier of clean images; expected one of noised latents, which "
                f"`{LAYOUT.command}` writes"
            )
        settings = stored.read_settings(path, LAYOUT)
        if control is not None:
            stored.check_control(path, LAYOUT, settings, control)
        spec = stored.control_of(path, LAYOUT, settings)
        try:
            network = NoisedNetwork(spec.num_classes, **settings["network_arguments"])
        except (TypeError, ValueError, IndexError, RuntimeError) as error:
            raise ModelError(
                f"the network of {path / SETTINGS} cannot be built from its arguments ({type(error).__name__}: {error}); fit "
                f"the classifier again with `{LAYOUT.command}`"
            ) from error
        stored.load_weights(network, path, LAYOUT, spec)
        classifier = cls(
            network,
            arguments=settings["network_arguments"],
            control=settings["control"],
            spec=spec,
            latent_shape=settings["latent_shape"],
            base_model=settings["base_model"],
            held_out=settings.get("held_out"),
            vae=settings.get("vae"),
        )
        return classifier.eval().requires_grad_(False).to(device)
