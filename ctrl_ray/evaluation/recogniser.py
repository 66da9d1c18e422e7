"""An independent judge of the drawn example: which shape in which colour an image shows.

It has seen drawn pixels only, never an image that a pipeline decoded, so that it can say whether a fine-tuned pipeline
still obeys its prompts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ctrl_ray.embedded import RECOGNISER
from ctrl_ray.offline.shapes import COLOURS, SHAPES, parse_prompt

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


class Recogniser(nn.Module):
    """A small convolutional network with one head for the colour and one for the shape.

    Args:
        colours: Names of the colours, in the order of the logits.
        shapes: Names of the shapes, in the order of the logits.
        width: Channels of the first layer.
    """

    def __init__(
        self, colours: Sequence[str] = tuple(COLOURS), shapes: Sequence[str] = SHAPES, width: int = 24
    ) -> None:
        super().__init__()
        self.colours, self.shapes, self.width = tuple(colours), tuple(shapes), width
        channels = (3, width, 2 * width, 3 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(before, after, 5, stride=2, padding=2), nn.GroupNorm(4, after), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(channels[-1], channels[-1], 3, padding=1), nn.SiLU())
        self.colour_head = nn.Linear(2 * channels[-1], len(self.colours))
        self.shape_head = nn.Linear(2 * channels[-1], len(self.shapes))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, colours) and (B, shapes) of images (B, 3, 64, 64) in [0, 1]."""
        if images.ndim != 4 or images.shape[1:] != (3, 64, 64):
            raise ValueError(f"images must be (B, 3, 64, 64) with values in [0, 1], got {tuple(images.shape)}")
        features = self.features(2.0 * images - 1.0)
        pooled = torch.cat([features.mean(dim=(2, 3)), features.amax(dim=(2, 3))], dim=1)
        return self.colour_head(pooled), self.shape_head(pooled)

    @torch.no_grad()
    def recognise(self, images: Tensor) -> tuple[list[str], list[str]]:
        """Names of the colour and of the shape in each of images (B, 3, 64, 64) in [0, 1]."""
        colour_logits, shape_logits = self(images)
        colours = [self.colours[index] for index in colour_logits.argmax(dim=1).tolist()]
        shapes = [self.shapes[index] for index in shape_logits.argmax(dim=1).tolist()]
        return colours, shapes

    def is_right(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Whether each image shows both the colour and the shape of its prompt: (B,) bool, on the CPU.

        Raises:
            ValueError: A prompt is not "a COLOUR SHAPE", or there are not as many prompts as images.
        """
        if len(prompts) != len(images):
            raise ValueError(f"prompts ({len(prompts)}) must be as many as images ({len(images)})")
        seen = zip(*self.recognise(images), strict=True)
        return torch.tensor([parse_prompt(prompt) == pair for prompt, pair in zip(prompts, seen, strict=True)])

    def save_pretrained(self, path: str | Path) -> None:
        """Write weights (float16) and configuration into the folder `path`."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.half().contiguous() for name, tensor in self.state_dict().items()}, folder / _WEIGHTS)
        config = {"colours": self.colours, "shapes": self.shapes, "width": self.width}
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None) -> Recogniser:
        """Read a recogniser (float32, eval mode) from a folder, by default the one that the package ships."""
        folder = RECOGNISER if path is None else Path(path)
        recogniser = cls(**json.loads((folder / _CONFIG).read_text()))
        recogniser.load_state_dict({name: tensor.float() for name, tensor in load_file(folder / _WEIGHTS).items()})
        return recogniser.eval().requires_grad_(False)
