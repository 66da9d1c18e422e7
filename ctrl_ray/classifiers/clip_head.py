"""An oracle from a file: a linear layer or an MLP on the image features of a CLIP, such as an aesthetic score.

'clip_head:FILE' is the score of the head in FILE on the unit-length image embedding of CLIP ViT-L/14, 'clip_head:FILE@MODEL'
that on another CLIP (folder or hub id). The file is safetensors: for each linear layer NAME.weight (out, in) and NAME.bias
(out,), taken in the order of their names (2 before 10), the last with one output. Between them stands what the file's metadata
names as "activation": "none" (as in LAION's predictor, Schuhmann 2022, whose layers are linear throughout), "relu" or "gelu".

Processes of other hosts read the file under the same path.

    from safetensors.torch import save_file
    save_file(torch.load("sac+logos+ava1-l14-linearMSE.pth", weights_only=True), "aesthetic.safetensors")
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ctrl_ray.classifiers.backbones import Preprocessing, load_vision
from ctrl_ray.config.presets import CLIP_MODEL
from ctrl_ray.errors import ConfigError
from ctrl_ray.oracles import to_rgb
from ctrl_ray.policy.device import fastest_device
from ctrl_ray.wording import no_file

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu}


class ClipHead(nn.Module):
    """Linear layers with one activation between them.

    Args:
        layers: (weight (out, in), bias (out,)) of each.
        activation: 'none', 'relu' or 'gelu'.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], activation: str = "none") -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(weight, requires_grad=False) for weight, _ in layers])
        self.biases = nn.ParameterList([nn.Parameter(bias, requires_grad=False) for _, bias in layers])
        self.activation = activation

    @property
    def num_features(self) -> int:
        """Width of what it looks at."""
        return int(self.weights[0].shape[1])

    def forward(self, features: Tensor) -> Tensor:
        """Scores (B,) of features (B, num_features)."""
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            features = F.linear(_ACTIVATIONS[self.activation](features) if index else features, weight, bias)
        return features[:, 0]


class ClipHeadOracle:
    """Scores of PIL images: the centre square of each, through a CLIP and a head, in float32."""

    def __init__(
        self,
        head: ClipHead,
        preprocessing: Preprocessing,
        vision: nn.Module,
        name: str,
        device: str | torch.device = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self.head, self.preprocessing, self.vision = (
            part.eval().to(self.device) for part in (head, preprocessing, vision)
        )
        self.__name__ = name

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> float:
        """The score of one image of any size and mode."""
        rgb = to_rgb(image)
        side = min(rgb.size)
        left, top = (rgb.width - side) // 2, (rgb.height - side) // 2
        square = rgb.crop((left, top, left + side, top + side))
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).view(1, side, side, 3)
        images = self.preprocessing(pixels.to(self.device).permute(0, 3, 1, 2).float() / 255)
        return float(self.head(F.normalize(self.vision(pixel_values=images).image_embeds, dim=1)))


@functools.lru_cache(maxsize=2)
def load(spec: str) -> ClipHeadOracle:
    """The oracle of 'FILE' or 'FILE@MODEL'; read once in each process, and on an accelerator where the process sees one.

    ConfigError where the file is no head, or one for another width of features; ModelError where the CLIP cannot be loaded.
    """
    file, _, model = spec.partition("@")
    head = read_head(file)
    preprocessing, vision = load_vision(model or CLIP_MODEL)
    width = int(vision.config.projection_dim)
    if head.num_features != width:
        raise ConfigError(
            f"the head {file} is for {head.num_features} features, but {model or CLIP_MODEL} has {width}; name the CLIP that "
            "it was fitted on: clip_head:FILE@FOLDER_OR_HUB_ID"
        )
    name = f"clip_head of {Path(file).name}"
    return ClipHeadOracle(head, preprocessing, vision.requires_grad_(False), name, fastest_device())


def read_head(file: str | Path) -> ClipHead:
    """The head in a safetensors file; ConfigError says what is missing or does not fit."""
    path = Path(file)
    if not path.is_file():
        raise ConfigError(
            f"the head {path} {no_file(path)}; expected a safetensors file of linear layers (NAME.weight and NAME.bias of "
            "each) on CLIP's image features; ctrl_ray/classifiers/clip_head.py has the lines that make one of a .pth file"
        )
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {key: opened.get_tensor(key).float() for key in opened.keys()}  # noqa: SIM118 (no mapping)
            activation = (opened.metadata() or {}).get("activation", "none")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the head {path} is not a safetensors file ({error}); save it with safetensors") from error
    if activation not in _ACTIVATIONS:
        raise ConfigError(
            f"the head {path} names the activation {activation!r} in its metadata; expected one of {', '.join(_ACTIVATIONS)}"
        )
    return ClipHead(_layers(path, tensors), activation)


def _layers(path: Path, tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    names = sorted((key for key in tensors if key.rpartition(".")[2] == "weight"), key=_natural)
    layers = []
    for name in names:
        weight = tensors[name]
        bias = tensors.get(f"{name.removesuffix('weight')}bias", torch.zeros(len(weight)))
        layers.append((weight, bias))
    known = {*names, *(f"{name.removesuffix('weight')}bias" for name in names)}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    linear = all(weight.dim() == 2 and bias.shape == weight.shape[:1] for weight, bias in layers)
    if not layers or not linear or set(tensors) - known or layers[-1][0].shape[0] != 1 or _broken(layers):
        raise ConfigError(
            f"the head {path} holds {shapes}; expected linear layers only, each NAME.weight (out, in) and NAME.bias (out,), "
            "each as wide as the one before has outputs, the last with 1 output"
        )
    return layers


def _broken(layers: list[tuple[Tensor, Tensor]]) -> bool:
    return any(first.shape[0] != then.shape[1] for (first, _), (then, _) in zip(layers, layers[1:]))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts numbers in a name by their value."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]
