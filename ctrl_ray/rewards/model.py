"""log p(y|x,c) of clean latents and its gradient: the VAE decoder followed by one classifier per control."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import ConfigError, NonFiniteError, RewardError
from ctrl_ray.policy.decoder import LatentDecoder, to_uint8
from ctrl_ray.rewards.protocol import RewardAnswer
from ctrl_ray.rewards.spec import RewardModelSpec
from ctrl_ray.runs.copies import folder_here


class ControlClassifier(Protocol):
    """What a reward needs of a classifier; `ctrl_ray.classifiers.classifier.ImageClassifier` is one."""

    control: str
    spec: ControlConfig

    def class_log_probs(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B, K) log-softmaxed and differentiable, of images (B, 3, H, W) in [0, 1]."""
        ...


class RewardModel(nn.Module):
    """Latents in, log p(y_c|x,c) of every control and its latent gradient out; frozen, and always in eval mode."""

    def __init__(self, decoder: LatentDecoder, classifiers: Sequence[ControlClassifier]) -> None:
        super().__init__()
        names = [classifier.control for classifier in classifiers]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"a reward needs one classifier for each control; got classifiers for {names}")
        self.decoder = decoder
        self.classifiers = nn.ModuleList(classifiers)  # type: ignore[arg-type]
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> RewardModel:
        """Stay in eval mode whatever the caller asks for: a reward has no dropout and no running statistics."""
        return super().train(False)

    @property
    def controls(self) -> dict[str, int]:
        """Number of classes of each control, in the order of the label columns."""
        return {classifier.control: classifier.spec.num_classes for classifier in self._classifiers()}

    @property
    def chunk_size(self) -> int:
        """Images decoded at a time."""
        return self.decoder.chunk_size

    @chunk_size.setter
    def chunk_size(self, size: int) -> None:
        self.decoder.chunk_size = size

    @property
    def device(self) -> torch.device:
        """Where the model computes; inputs are moved there and answers moved back."""
        return self.decoder.vae.device

    def evaluate(self, latents: Tensor, prompts: Sequence[str], labels: Tensor, weights: Tensor) -> RewardAnswer:
        """log p(y_c|x,c) (B, C) and the cotangent d/d latents Σ_c weights[:, c] log p_c, both unreduced.

        latents (B, ch, h, w), prompts B strings, labels (B, C) integers in [0, num_classes] with num_classes = null,
        weights (B, C). A null label has log p 0 and no gradient, whatever its weight. Forward and backward run chunk
        by chunk (`decoder.chunk_size`), so memory does not grow with B. Answers have the model's precision (float32)
        and the latents' device. Raises RewardError for shapes that do not fit and for latents, log-probabilities or
        cotangents that are not finite (with the samples' positions), ConfigError for a label out of range.
        """
        self._check(latents, prompts, labels, weights)
        log_probs, cotangents = [], []
        for rows in self._chunks(len(latents)):
            answer = self._evaluate_chunk(latents[rows], prompts[rows], labels[rows], weights[rows])
            log_probs.append(answer[0])
            cotangents.append(answer[1])
        rewarded = RewardAnswer(torch.cat(log_probs).to(latents.device), torch.cat(cotangents).to(latents.device))
        _require_finite("log-probabilities", rewarded.log_probs)
        _require_finite("cotangents", rewarded.cotangent)
        return rewarded

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, H, W, 3) uint8 on the CPU, as a PNG stores them."""
        _require_finite("latents", latents)
        chunks = [to_uint8(self.decoder.decode(self._move(latents[rows]))) for rows in self._chunks(len(latents))]
        return torch.cat(chunks).cpu()

    @torch.no_grad()
    def class_log_probs(self, inputs: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """log p(y|x,c) of every class, (B, K) for each control, of latents (B, ch, h, w) or of images as `decode`
        returns them (uint8, (B, H, W, 3))."""
        if len(prompts) != len(inputs):
            raise RewardError(f"{len(inputs)} samples came with {len(prompts)} prompts; expected one for each")
        chunks: dict[str, list[Tensor]] = {name: [] for name in self.controls}
        for rows in self._chunks(len(inputs)):
            images = self._images(inputs[rows])
            for classifier in self._classifiers():
                chunks[classifier.control].append(classifier.class_log_probs(images, prompts[rows]))
        answers = {name: torch.cat(parts).to(inputs.device) for name, parts in chunks.items()}
        for name, answer in answers.items():
            _require_finite(f"log-probabilities of {name}", answer)
        return answers

    def _evaluate_chunk(
        self, latents: Tensor, prompts: Sequence[str], labels: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = self._move(latents).detach().requires_grad_()
            images = self.decoder.decode(leaf)
            columns = []
            for index, classifier in enumerate(self._classifiers()):
                asked = labels[:, index].to(leaf.device)
                null = asked == classifier.spec.num_classes
                of_all = classifier.class_log_probs(images, prompts)
                of_asked = of_all.gather(1, asked.masked_fill(null, 0).long()[:, None])[:, 0]
                columns.append(torch.where(null, torch.zeros_like(of_asked), of_asked))
            log_probs = torch.stack(columns, dim=1)
            objective = (self._move(weights).masked_fill(self._is_null(labels).to(leaf.device), 0) * log_probs).sum()
            (cotangent,) = torch.autograd.grad(objective, leaf)
        return log_probs.detach(), cotangent

    def _check(self, latents: Tensor, prompts: Sequence[str], labels: Tensor, weights: Tensor) -> None:
        batch, columns = len(latents), len(self.classifiers)
        if batch == 0 or latents.ndim != 4 or not latents.is_floating_point():
            raise RewardError(
                f"latents have shape {_shape(latents)} and type {latents.dtype}; expected float (B, C, h, w)"
            )
        if len(prompts) != batch:
            raise RewardError(f"{batch} latents came with {len(prompts)} prompts; expected one prompt for each")
        for name, tensor in (("labels", labels), ("weights", weights)):
            if _shape(tensor) != (batch, columns):
                raise RewardError(
                    f"{name} have shape {_shape(tensor)}; expected {(batch, columns)}: {batch} samples × the controls "
                    f"{list(self.controls)}"
                )
        if labels.is_floating_point():
            raise RewardError(f"labels have type {labels.dtype}; expected integers")
        for index, (name, num_classes) in enumerate(self.controls.items()):
            column = labels[:, index]
            wrong = column[(column < 0) | (column > num_classes)]
            if len(wrong):
                raise ConfigError(
                    f"label {int(wrong[0])} of control {name!r} is out of range; expected 0 to {num_classes - 1}, or "
                    f"{num_classes} for null"
                )
        _require_finite("latents", latents)
        _require_finite("weights", weights.masked_fill(self._is_null(labels).to(weights.device), 0))

    def _is_null(self, labels: Tensor) -> Tensor:
        return labels == torch.tensor(list(self.controls.values()), device=labels.device)

    def _images(self, inputs: Tensor) -> Tensor:
        if inputs.dtype == torch.uint8:
            return self._move(inputs.permute(0, 3, 1, 2)) / 255
        _require_finite("latents", inputs)
        return self.decoder.decode(self._move(inputs))

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, self.decoder.vae.dtype)

    def _chunks(self, batch: int) -> Iterator[slice]:
        for start in range(0, batch, self.decoder.chunk_size):
            yield slice(start, start + self.decoder.chunk_size)

    def _classifiers(self) -> Iterator[ControlClassifier]:
        yield from self.classifiers  # type: ignore[misc]


def load_reward_model(spec: RewardModelSpec) -> RewardModel:
    """The reward model of a spec, on its device.

    Raises ModelError for a base model or classifier folder that cannot be loaded, and for a classifier of another
    control than the one it is given for.
    """
    from ctrl_ray.classifiers.classifier import ImageClassifier, read_control
    from ctrl_ray.policy.backbones import load_backbone

    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    decoder = load_backbone(spec.base_model, spec.revision).load_decoder(spec.decode_chunk_size, spec.device)
    classifiers = []
    for control, folder in spec.classifiers.items():
        here = folder_here(folder, spec.copies)
        read_control(here, control)
        classifiers.append(ImageClassifier.from_pretrained(here, spec.device))
    return RewardModel(decoder, classifiers)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _require_finite(name: str, values: Tensor | None) -> None:
    """NonFiniteError with the positions of the samples (first dimension) that hold a NaN or an infinity."""
    if values is None or bool(torch.isfinite(values).all()):
        return
    bad = (~torch.isfinite(values)).flatten(1).any(dim=1).nonzero()[:, 0].tolist()
    shown = ", ".join(map(str, bad[:8])) + (", ..." if len(bad) > 8 else "")
    raise NonFiniteError(
        f"{name} are not finite for {len(bad)} of {len(values)} samples (positions {shown} of the batch); the policy has "
        "probably diverged: lower optimizer.learning_rate or guidance_strength, or start again from an earlier checkpoint"
    )
