"""A fitted p(y|x,c): log-probabilities at its temperature, saved as safetensors and JSON."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctrl_ray.classifiers.networks import SmallCNN
from ctrl_ray.classifiers.soundness import doubts
from ctrl_ray.classifiers.stored import (
    WEIGHTS,
    Layout,
    check_control,
    control_of,
    load_weights,
    read_settings,
    write_folder,
)
from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import ModelError

SETTINGS = "classifier.json"
_TOKENIZER = "tokenizer"
_NETWORKS = ("cnn", "transformers", "clip")
_LAYOUT = Layout(
    "classifier folder",
    SETTINGS,
    "python -m ctrl_ray.classify",
    {"network": str, "network_arguments": dict, "temperature": float, "image_size": int | tuple[int, int]},
    {"base_model": str, "calibration": dict | None},
)


def build_network(kind: str, num_classes: int, arguments: Mapping[str, Any]) -> nn.Module:
    """A network with random weights: `kind` is 'cnn', 'transformers' or 'clip', `arguments` as in `classifier.json`.

    Raises ModelError for another kind, or for arguments that the kind does not take.
    """
    if kind not in _NETWORKS:
        raise ModelError(f"classifier network {kind!r} is unknown; expected one of {', '.join(_NETWORKS)}")
    try:
        if kind == "cnn":
            return SmallCNN(num_classes, **arguments)
        from ctrl_ray.classifiers.backbones import ClipHeadClassifier, TransformersClassifier

        return {"transformers": TransformersClassifier, "clip": ClipHeadClassifier}[kind](num_classes, **arguments)
    except (TypeError, KeyError, ValueError) as error:
        raise ModelError(
            f"classifier network {kind!r} cannot be built from its arguments ({type(error).__name__}: {error}); the "
            "folder was written by another version, fit the classifier again"
        ) from error


def new_network(network: str, num_classes: int, *, prompt_conditional: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The network that `ClassifierConfig.network` names, ready to be fitted, and the arguments that build it again."""
    if network == "cnn":
        arguments: dict[str, Any] = {"prompt_conditional": prompt_conditional}
        return SmallCNN(num_classes, **arguments), arguments
    from ctrl_ray.classifiers.backbones import load_pretrained

    return load_pretrained(network, num_classes, prompt_conditional=prompt_conditional)


class ImageClassifier(nn.Module):
    """p(y|x,c) of one control: a network, its temperature, and what its classes mean.

    Args:
        network: Logits (B, K) of images (B, 3, H, W) in [0, 1] and prompts.
        kind: 'cnn', 'transformers' or 'clip'.
        arguments: What builds the network again.
        control: Name of the control.
        spec: Its classes, thresholds, unit and oracle; K is `spec.num_classes`.
        temperature: Logits are divided by it.
        image_size: (height, width) in pixels of the images it was fitted on.
        base_model: The pipeline whose VAE decoded them; "" where none did.
        calibration: Figures on held-out images, as `fitting` reports them.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        kind: str,
        arguments: Mapping[str, Any],
        control: str,
        spec: ControlConfig,
        temperature: float = 1.0,
        image_size: tuple[int, int] = (64, 64),
        base_model: str = "",
        calibration: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not (math.isfinite(temperature) and temperature > 0):
            raise ModelError(f"classifier temperature is {temperature}; expected a finite number above 0")
        self.network = network
        self.kind, self.arguments = kind, dict(arguments)
        self.control, self.spec = control, spec
        self.temperature = float(temperature)
        self.image_size, self.base_model = image_size, base_model
        self.calibration = dict(calibration or {})

    @property
    def prompt_conditional(self) -> bool:
        """Whether the classifier needs prompts."""
        return bool(self.arguments.get("prompt_conditional", False))

    @property
    def doubts(self) -> tuple[str, ...]:
        """What its own figures on held-out images give to doubt, a sentence each."""
        return doubts(self.spec.class_names, self.temperature, self.calibration)

    def logits(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Logits (B, K) before scaling, of images (B, 3, H, W) in [0, 1].

        Raises ModelError when the classifier depends on prompts and there are none, or not as many as images.
        """
        if self.prompt_conditional and (prompts is None or len(prompts) != len(images)):
            got = "none" if prompts is None else str(len(prompts))
            raise ModelError(
                f"the classifier of control {self.control!r} depends on the prompt: expected {len(images)} prompts, "
                f"one for each image, got {got}"
            )
        return self.network(images, prompts if self.prompt_conditional else None)

    def class_log_probs(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """log p(y|x,c) = log_softmax(logits / temperature): (B, K), at least float32, differentiable in the images."""
        logits = self.logits(images, prompts)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax(logits / self.temperature, dim=1)

    def forward(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Same as `class_log_probs`."""
        return self.class_log_probs(images, prompts)

    def save(self, folder: str | Path) -> None:
        """Write `model.safetensors` and `classifier.json` (and a tokenizer, where there is one) into `folder`."""
        path = Path(folder)
        height, width = self.image_size
        more = {
            "network": self.kind,
            "network_arguments": self.arguments,
            "temperature": self.temperature,
            "image_size": height if height == width else [height, width],
            "base_model": self.base_model,
            "calibration": self.calibration,
        }
        write_folder(path, _LAYOUT, self.network, self.control, self.spec, more)
        tokenizer: Any = getattr(self.network, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(path / _TOKENIZER)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> ImageClassifier:
        """The classifier that `save` wrote, frozen and in eval mode; reads the folder and nothing else.

        Raises ModelError for a missing or unreadable file, an unknown network, or a wrong number of outputs.
        """
        path = Path(folder)
        settings = read_settings(path, _LAYOUT)
        spec = control_of(path, _LAYOUT, settings)
        arguments, size = settings["network_arguments"], settings["image_size"]
        network = build_network(settings["network"], spec.num_classes, arguments)
        load_weights(network, path, _LAYOUT, spec)
        if settings["network"] == "clip" and arguments.get("prompt_conditional"):
            from ctrl_ray.classifiers.backbones import load_tokenizer

            network.tokenizer = load_tokenizer(path / _TOKENIZER)
        classifier = cls(
            network,
            kind=settings["network"],
            arguments=arguments,
            control=settings["control"],
            spec=spec,
            temperature=settings["temperature"],
            image_size=(size, size) if isinstance(size, int) else size,
            base_model=settings.get("base_model", ""),
            calibration=settings.get("calibration"),
        )
        return classifier.eval().requires_grad_(False).to(device)


def read_control(folder: str | Path, control: str) -> ControlConfig:
    """Classes, thresholds and oracle of the control that a classifier folder was fitted for, without loading the network.

    Raises ModelError for a folder that holds no classifier, and for the classifier of another control than `control`.
    """
    settings = read_settings(folder, _LAYOUT)
    check_control(folder, _LAYOUT, settings, control)
    return control_of(folder, _LAYOUT, settings)


def copy_classifier(source: str | Path, target: str | Path) -> None:
    """Copy the files that `ImageClassifier.from_pretrained` reads, and no others, into the folder `target`."""
    path = Path(target)
    path.mkdir(parents=True, exist_ok=True)
    if (Path(source) / _TOKENIZER).is_dir():
        shutil.copytree(Path(source) / _TOKENIZER, path / _TOKENIZER, dirs_exist_ok=True)
    for name in (WEIGHTS, SETTINGS):  # last what says that the rest is there
        shutil.copyfile(Path(source) / name, path / name)
