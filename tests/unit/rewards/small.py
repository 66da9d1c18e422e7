"""Small random reward models: the tiny pipeline's VAE, or a lighter one, and one random network per control."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ctrl_ray.config import ControlConfig
from ctrl_ray.policy.decoder import LatentDecoder, clamp_straight_through
from ctrl_ray.rewards.model import RewardModel

PROMPTS = ("a red circle", "a green square", "a blue cross", "a white triangle")


class SmallClassifier(nn.Module):
    """A random network with the interface of an ImageClassifier; its answer depends on the prompt's length."""

    def __init__(self, control: str, num_classes: int, seed: int) -> None:
        super().__init__()
        self.control = control
        self.spec = ControlConfig(classes=tuple(f"class {index}" for index in range(num_classes)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.features = nn.Sequential(
                nn.Conv2d(3, 8, 3, stride=2), nn.SiLU(), nn.Conv2d(8, 8, 3, stride=2), nn.SiLU()
            )
            self.dropout = nn.Dropout(0.5)
            self.head = nn.Linear(8, num_classes)
        with torch.no_grad():
            self.head.weight.mul_(20)

    def class_log_probs(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=images.dtype, device=images.device)
        features = self.dropout(self.features(images - 0.5)).mean(dim=(2, 3))
        return self.head(features * lengths[:, None] / 10).log_softmax(dim=1)


class DoubleDecoder(LatentDecoder):
    """The same decoder in the precision of its weights, for finite differences in float64."""

    def decode(self, latents: Tensor) -> Tensor:
        images = self.vae.decode(latents / self.scaling_factor + self.shift_factor).sample
        return clamp_straight_through(images / 2 + 0.5)


def small_classifiers() -> list[SmallClassifier]:
    return [SmallClassifier("jpeg_size", 4, seed=1), SmallClassifier("colourfulness", 3, seed=2)]


def small_model(pipeline: Path, chunk_size: int = 32) -> RewardModel:
    from ctrl_ray.policy.backbones import load_backbone

    return RewardModel(load_backbone(str(pipeline)).load_decoder(chunk_size), small_classifiers())


class LightVAE(nn.Module):
    """Decodes latents (B, 4, h, w) to images eight times as large; torch alone, so that an actor has it at once."""

    config = SimpleNamespace(scaling_factor=0.5, block_out_channels=(1, 1, 1, 1))
    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.decoder = nn.Sequential(
                nn.ConvTranspose2d(4, 8, 8, stride=8), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1), nn.Tanh()
            )

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.decoder(latents))


def light_model() -> RewardModel:
    return RewardModel(LatentDecoder(LightVAE()), small_classifiers())


def request(batch: int, seed: int = 0) -> tuple[Tensor, tuple[str, ...], Tensor, Tensor]:
    """Latents, prompts, labels (every fifth of the first control and every third of the second null) and weights."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, 4, 4, 4, generator=generator)
    labels = torch.stack(
        [torch.randint(0, 4, (batch,), generator=generator), torch.randint(0, 3, (batch,), generator=generator)], dim=1
    )
    labels[::5, 0], labels[1::3, 1] = 4, 3
    weights = torch.rand(batch, 2, generator=generator) * 3 + 0.5
    return latents, tuple(PROMPTS[index % len(PROMPTS)] for index in range(batch)), labels, weights
