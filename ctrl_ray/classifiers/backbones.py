"""Pre-trained backbones as networks of p(y|x,c): any transformers classifier, or a head on a CLIP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.utils import logging

from ctrl_ray.classifiers.networks import ClassHead, HashedText
from ctrl_ray.errors import ModelError

_TEXT_WIDTH = 32
_CLIPS = ("clip", "clip_vision_model")


class Preprocessing(nn.Module):
    """Differentiable resize and normalisation: what the backbone's own image processor does to a square image.

    Args:
        size: Height and width that the backbone was trained on.
        mean: Mean of each channel, in [0, 1].
        std: Standard deviation of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.size = (int(size[0]), int(size[1]))
        self.register_buffer("mean", torch.tensor(tuple(mean))[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std))[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] as the backbone's pixel values (B, 3, *size)."""
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", align_corners=False, antialias=True)
        return (images - self.mean) / self.std


class TransformersClassifier(nn.Module):
    """An image-classification model of transformers with its head replaced by one of `num_classes` outputs.

    With `prompt_conditional` a head on its (untouched) logits and the hashed prompt gives the logits instead: the
    backbone then has 128 outputs.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: dict[str, Any],
        preprocessing: dict[str, Any],
        prompt_conditional: bool = False,
    ) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(**preprocessing)
        self.text = HashedText(_TEXT_WIDTH) if prompt_conditional else None
        outputs = 4 * _TEXT_WIDTH if prompt_conditional else num_classes
        self.head = ClassHead(outputs, num_classes, num_text_features=_TEXT_WIDTH) if prompt_conditional else None
        config = AutoConfig.for_model(**backbone)
        config.num_labels = outputs
        self.backbone = AutoModelForImageClassification.from_config(config)

    def forward(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W) in [0, 1]."""
        outputs = self.backbone(pixel_values=self.preprocessing(images)).logits
        if self.head is None or self.text is None or prompts is None:
            return outputs
        return self.head(outputs, self.text(prompts))


class ClipHeadClassifier(nn.Module):
    """A head on the image features of a frozen CLIP; with `prompt_conditional` on its text features as well."""

    def __init__(
        self,
        num_classes: int,
        *,
        backbone: dict[str, Any],
        preprocessing: dict[str, Any],
        prompt_conditional: bool = False,
    ) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(**preprocessing)
        self.vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**backbone["vision"])).requires_grad_(False)
        self.text = None
        if prompt_conditional:
            self.text = CLIPTextModelWithProjection(CLIPTextConfig(**backbone["text"])).requires_grad_(False)
        features = int(self.vision.config.projection_dim)
        self.head = ClassHead(features, num_classes, num_text_features=features if prompt_conditional else 0)
        self.tokenizer: Any = None

    def train(self, mode: bool = True) -> ClipHeadClassifier:
        """The head follows `mode`; the frozen towers stay in eval mode."""
        super().train(mode)
        self.vision.eval()
        if self.text is not None:
            self.text.eval()
        return self

    def forward(self, images: Tensor, prompts: Sequence[str] | None = None) -> Tensor:
        """Logits (B, num_classes) of images (B, 3, H, W) in [0, 1]."""
        features = _unit_entries(self.vision(pixel_values=self.preprocessing(images)).image_embeds)
        text = self._text_features(prompts) if self.text is not None and prompts is not None else None
        return self.head(features, text)

    @torch.no_grad()
    def _text_features(self, prompts: Sequence[str]) -> Tensor:
        assert self.text is not None
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt",
            max_length=self.text.config.max_position_embeddings,
        ).to(self.text.device)  # fmt: skip
        return _unit_entries(self.text(tokens.input_ids, attention_mask=tokens.attention_mask).text_embeds)


def _unit_entries(embeddings: Tensor) -> Tensor:
    """Embeddings (B, D) at length √D, so that their entries are of about 1, as a head likes them."""
    return F.normalize(embeddings, dim=1) * embeddings.shape[1] ** 0.5


def load_pretrained(network: str, num_classes: int, *, prompt_conditional: bool) -> tuple[nn.Module, dict[str, Any]]:
    """A network 'clip:NAME_OR_FOLDER' or 'transformers:NAME_OR_FOLDER' with the pre-trained weights.

    Returns:
        The network, and the arguments that build it again without the network (the backbone's whole configuration).

    Raises:
        ModelError: The backbone cannot be found, read, or is not of the kind asked for.
    """
    kind, _, source = network.partition(":")
    try:
        config = AutoConfig.from_pretrained(source)
        if kind == "clip" and config.model_type not in _CLIPS:
            raise ModelError(
                f"classifier network {network!r} is a {config.model_type!r} model; 'clip:' expects a CLIP model, use "
                f"'transformers:{source}'"
            )
        arguments: dict[str, Any] = {
            "backbone": config.to_dict(),
            "preprocessing": _preprocessing(source, config),
            "prompt_conditional": prompt_conditional,
        }
        build = _clip if kind == "clip" else _transformers
        with _quiet():
            return build(source, num_classes, arguments), arguments
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"classifier network {network!r} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "expected a folder or hub id with safetensors weights and an image-processor configuration"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Inside, transformers tells nothing of weights that another head or the other tower would need, and shows no bar."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _transformers(source: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    network = TransformersClassifier(num_classes, **arguments)
    network.backbone = AutoModelForImageClassification.from_pretrained(
        source, num_labels=network.backbone.config.num_labels, ignore_mismatched_sizes=True, use_safetensors=True,
        dtype=torch.float32,
    )  # fmt: skip
    return network


def load_vision(source: str) -> tuple[Preprocessing, Any]:
    """The image side of a CLIP (folder or hub id): its preprocessing, and its vision tower with the projection.

    ModelError where it cannot be found or read, or is no CLIP.
    """
    try:
        config = AutoConfig.from_pretrained(source)
        if config.model_type not in _CLIPS:
            raise ModelError(f"{source} is a {config.model_type!r} model; expected a CLIP")
        with _quiet():
            return Preprocessing(**_preprocessing(source, config)), _vision(source)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"CLIP model {source!r} cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0]}); expected a folder "
            "or hub id with safetensors weights and an image-processor configuration"
        ) from error


def _vision(source: str) -> Any:
    return CLIPVisionModelWithProjection.from_pretrained(source, use_safetensors=True, dtype=torch.float32)


def _clip(source: str, num_classes: int, arguments: dict[str, Any]) -> nn.Module:
    vision = _vision(source)
    arguments["backbone"] = {"vision": vision.config.to_dict()}
    if arguments["prompt_conditional"]:
        text = CLIPTextModelWithProjection.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
        arguments["backbone"]["text"] = text.config.to_dict()
    network = ClipHeadClassifier(num_classes, **arguments)
    network.vision = vision.requires_grad_(False)
    if arguments["prompt_conditional"]:
        network.text = text.requires_grad_(False)
        network.tokenizer = AutoTokenizer.from_pretrained(source)
    return network.train(network.training)


def _preprocessing(source: str, config: Any) -> dict[str, Any]:
    processor = AutoImageProcessor.from_pretrained(source).to_dict()
    size = processor.get("crop_size") or processor.get("size") or {}
    if isinstance(size, int):
        size = {"height": size, "width": size}
    side = size.get("shortest_edge") or getattr(getattr(config, "vision_config", config), "image_size", 224)
    height, width = size.get("height", side), size.get("width", side)
    return {
        "size": [height, width],
        "mean": list(processor.get("image_mean") or (0.5, 0.5, 0.5)),
        "std": list(processor.get("image_std") or (0.5, 0.5, 0.5)),
    }


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer stored beside a prompt-conditional CLIP classifier."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(f"classifier folder {folder.parent} lacks its tokenizer in {folder.name}: {error}") from error
