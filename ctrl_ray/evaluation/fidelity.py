"""How well samples show their prompt, by a judge that had no part in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctrl_ray.config import EvaluationConfig
from ctrl_ray.embedded import RECOGNISER
from ctrl_ray.errors import ModelError
from ctrl_ray.evaluation.brisque import Brisque
from ctrl_ray.evaluation.judging import ImageScore
from ctrl_ray.evaluation.recogniser import Recogniser
from ctrl_ray.offline.shapes import PROMPTS
from ctrl_ray.policy.decoder import to_pixels
from ctrl_ray.policy.device import fastest_device

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_RECOGNISER_SIZE = 64


class RecogniserFidelity:
    """1 where the shapes recogniser sees both the colour and the shape of the prompt, else 0."""

    name = "shapes recogniser"

    def __init__(self, recogniser: Recogniser | None = None, batch_size: int = 128) -> None:
        self.recogniser = Recogniser.from_pretrained() if recogniser is None else recogniser
        self.batch_size = batch_size

    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Scores (N,) in {0, 1} of images (N, 64, 64, 3) uint8; ValueError for another size or another grammar."""
        scores = [
            self.recogniser.is_right(
                to_pixels(images[start : start + self.batch_size]), prompts[start : start + self.batch_size]
            ).numpy()
            for start in range(0, len(images), self.batch_size)
        ]
        return np.concatenate(scores).astype(np.float64)


class ClipFidelity:
    """Cosine similarity of a CLIP model's image and text embeddings (the CLIP score of Hessel et al., 2021, unscaled).

    Images are resized bicubically so that the shorter side fits, and cut to the centre square. Prompts longer than the
    model's context are cut.

    Args:
        name_or_folder: A `transformers` CLIP model with its tokenizer: a folder or a hub id.

    Raises:
        ModelError: The model cannot be loaded (safetensors only).
    """

    def __init__(
        self,
        name_or_folder: str,
        *,
        revision: str | None = None,
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.name = f"CLIP score of {name_or_folder}"
        self.batch_size, self.device = batch_size, torch.device(device)
        if name_or_folder.startswith((".", "/")) and not Path(name_or_folder).is_dir():
            raise ModelError(
                f"CLIP folder {name_or_folder} does not exist; give a transformers CLIP folder or a hub id"
            )
        try:
            model = CLIPModel.from_pretrained(name_or_folder, revision=revision or "main", use_safetensors=True)
            self.tokenizer = AutoTokenizer.from_pretrained(name_or_folder, revision=revision or "main")
        except (OSError, ValueError) as error:
            raise _cannot_be_loaded(name_or_folder, error) from error
        self.model = model.to(self.device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """Scores (N,) in [-1, 1] of images (N, H, W, 3) uint8."""
        text_of = self._embed_prompts(sorted(set(prompts)))
        scores = []
        for start in range(0, len(images), self.batch_size):
            pixels = self._pixels(to_pixels(images[start : start + self.batch_size]).to(self.device))
            vision = self.model.vision_model(pixel_values=pixels).pooler_output
            image_embeddings = F.normalize(self.model.visual_projection(vision), dim=-1)
            texts = torch.stack([text_of[prompt] for prompt in prompts[start : start + self.batch_size]])
            scores.append((image_embeddings * texts).sum(dim=-1).double().cpu().numpy())
        return np.concatenate(scores)

    def _embed_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        length = self.model.config.text_config.max_position_embeddings
        embedded: dict[str, Tensor] = {}
        for start in range(0, len(prompts), self.batch_size):
            batch = list(prompts[start : start + self.batch_size])
            tokens = self.tokenizer(batch, padding=True, truncation=True, max_length=length, return_tensors="pt")
            tokens = {key: tokens[key].to(self.device) for key in ("input_ids", "attention_mask")}
            texts = self.model.text_projection(self.model.text_model(**tokens).pooler_output)
            embedded |= dict(zip(batch, F.normalize(texts, dim=-1), strict=True))
        return embedded

    def _pixels(self, images: Tensor) -> Tensor:
        size = self.model.config.vision_config.image_size
        height, width = images.shape[-2:]
        scale = size / min(height, width)
        resized = F.interpolate(
            images,
            size=(max(size, round(height * scale)), max(size, round(width * scale))),
            mode="bicubic",
            antialias=True,
            align_corners=False,
        ).clamp(0, 1)
        top, left = (resized.shape[-2] - size) // 2, (resized.shape[-1] - size) // 2
        cut = resized[..., top : top + size, left : left + size]
        mean, std = (cut.new_tensor(values)[:, None, None] for values in (_CLIP_MEAN, _CLIP_STD))
        return (cut - mean) / std


def check_clip_model(name_or_folder: str) -> None:
    """ModelError unless a CLIP model's configuration and tokenizer can be read; no weights are."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        kind = AutoConfig.from_pretrained(name_or_folder).model_type
        AutoTokenizer.from_pretrained(name_or_folder)
    except (OSError, ValueError) as error:
        raise _cannot_be_loaded(name_or_folder, error) from error
    if kind != "clip":
        raise ModelError(f"CLIP model {name_or_folder!r} is a {kind!r} model; give a folder or hub id of a CLIPModel")


def _cannot_be_loaded(name_or_folder: str, error: Exception) -> ModelError:
    return ModelError(
        f"CLIP model {name_or_folder!r} cannot be loaded ({str(error).splitlines()[0]}); give a folder or hub id that holds a "
        "CLIPModel in safetensors and its tokenizer, or no clip_model"
    )


class Judges(NamedTuple):
    """What scores images beside the oracles, as `judge` takes it."""

    fidelity: RecogniserFidelity | ClipFidelity | None
    """None: nothing that was given can judge these prompts, and `judge` notes it."""
    scorers: Mapping[str, ImageScore]


def choose_judges(
    prompts: Sequence[str],
    image_size: tuple[int, int],
    clip_model: str | None = None,
    brisque_model: str | None = None,
) -> Judges:
    """The judges of images (height, width) of these prompts.

    Prompts are judged by the shapes recogniser where every one is of its grammar and the images are of its size, else by the
    CLIP model, if one is named, on an accelerator where this process sees one. clip_model, brisque_model: see
    `EvaluationConfig`. ModelError for one that cannot be loaded.
    """
    scorers: dict[str, ImageScore] = {}
    clip = None if clip_model is None else ClipFidelity(clip_model, device=fastest_device())
    if clip is not None:
        scorers["clip_score"] = clip
    if brisque_model is not None:
        scorers["brisque"] = Brisque.from_folder(brisque_model)
    known = set(prompts) <= set(PROMPTS) and image_size == (_RECOGNISER_SIZE, _RECOGNISER_SIZE)
    recogniser = RecogniserFidelity() if known and (RECOGNISER / "config.json").is_file() else None
    return Judges(recogniser or clip, scorers)


def judges_of(evaluation: EvaluationConfig, prompts: Sequence[str], image_size: tuple[int, int]) -> Judges:
    """`choose_judges` with the models that a run names."""
    return choose_judges(prompts, image_size, evaluation.clip_model, evaluation.brisque_model)
