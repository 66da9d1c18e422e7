"""The augmented model: a frozen denoiser plus LoRA that knows the labels, and the same weights without it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ctrl_ray.config import AdapterKind, LoraConfig, Precision
from ctrl_ray.diffusion.steps import ModelOutput, combine_guidance
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.backbones.base import Backbone
from ctrl_ray.policy.control.embeddings import ControlEmbeddings
from ctrl_ray.policy.control.gains import add_label_gains, folded_weights, label_gains
from ctrl_ray.policy.cotangent_scale import CotangentScale
from ctrl_ray.policy.lora import LORA_NAME, add_lora
from ctrl_ray.policy.peft_internals import switch_adapter
from ctrl_ray.policy.precision import half_dtype, keep_in_float32
from ctrl_ray.policy.protocol import Inputs, TrainablePolicy

_REPEATED_BLOCKS = ("ResnetBlock2D", "TransformerBlock")
"""Ends of diffusers' names of the blocks that a denoiser has many of; nearly all of its operations are theirs."""


class ControlledPolicy(TrainablePolicy):
    """Policy and reference over one frozen backbone; owns every trainable parameter, so that one engine shards them.

    `reference` is an argument of the forward, never a global toggle: with gradient checkpointing the recomputation
    re-enters the mode of its own forward. LoRA has no dropout, and the backbone stays in eval mode: what the rollout
    computes, the adjoint pass computes again. At initialisation policy and reference are equal bit for bit (B matrices and
    embeddings are zero), and with label gains alone they stay so for samples whose labels are all null.
    """

    def __init__(
        self,
        backbone: Backbone,
        denoiser: nn.Module,
        num_classes: Mapping[str, int],
        *,
        lora: LoraConfig | None,
        kind: AdapterKind = "embedding",
        full_finetune: bool = False,
        precision: Precision = "fp32",
        seed: int = 0,
    ) -> None:
        """num_classes: classes of each control, in label-column order. lora: None with `full_finetune` (all weights are
        trained, and a frozen copy of them is the reference), else the pre-trained model alone, with nothing to train but
        the control embeddings. kind: how the labels reach a denoiser with LoRA. precision: a frozen denoiser comes in its
        type (`frozen_dtype`); one that is trained comes in float32, and runs under autocast in bf16 and fp16."""
        super().__init__()
        self.backbone = backbone
        self.latent_shape = backbone.latent_shape
        half = half_dtype(precision)
        self._autocast_dtype = half if full_finetune else None
        if half is not None:
            keep_in_float32(backbone.output_layers(denoiser))
        # under the family's own name, which its parameters have in checkpoints
        self.add_module(backbone.denoiser, denoiser.eval())
        self.reference_denoiser: nn.Module | None = None
        if full_finetune:
            self.reference_denoiser = copy.deepcopy(denoiser).requires_grad_(False)
            denoiser.requires_grad_(True)
        else:
            denoiser.requires_grad_(False)
        self.lora, self.kind = lora, kind
        if lora is not None:
            targets = _targets(backbone, denoiser, lora)
            if kind == "embedding":
                add_lora(denoiser, lora, seed)
            else:
                add_label_gains(targets, num_classes, lora.rank, seed)
                for layer in targets.values():
                    layer.register_forward_hook(self._add_label_gains)
        point, width = backbone.embedding_point(denoiser)
        self.controls = ControlEmbeddings(num_classes, None if lora is not None and kind == "gains" else width)
        self._lora_layers = [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]
        self._scale = 1.0
        self._reference = False
        self._labels: Tensor | None = None
        self._folded: tuple[Tensor, dict[str, Tensor]] | None = None
        if self.controls.tables:
            point.register_forward_hook(self._add_control_embedding)
        self._cotangent_scale: CotangentScale | None = None
        if precision == "fp16":
            self.enable_cotangent_scaling()

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser, with LoRA where it has some."""
        return self.get_submodule(self.backbone.denoiser)

    def forward(self, latents: Tensor, time: Tensor, inputs: Inputs, *, reference: bool) -> ModelOutput:
        """Guided prediction, float32 like the latents (B, C, H, W); time: a scalar, or without guidance (B,)."""
        condition, guidance = inputs.condition, inputs.guidance
        branches = guidance.branches
        null = self.controls.null(len(latents), inputs.labels.device)
        dropped = inputs.labels if guidance.null_branch == "class" else null
        of_branch = {"null": dropped, "prompt": null, "control": inputs.labels}
        labels = _stack([of_branch[branch] for branch in branches])
        sources = []
        for branch in branches:
            tensors = condition.null_tensors if branch == "null" else condition.tensors
            if tensors is None:
                raise ConfigError(
                    f"guidance_scale is {guidance.scale}, but this base model has no unconditional branch; use 1"
                )
            sources.append(tensors)
        rows = latents.repeat(len(branches), *[1] * (latents.dim() - 1))
        stacked = {name: _stack([tensors[name] for tensors in sources]) for name in sources[0]}
        denoiser = self.denoiser
        if reference and self.reference_denoiser is not None:
            denoiser = self.reference_denoiser
        folded = None if reference or len(branches) > 1 else self._folded_for(inputs.labels)
        with self._mode(reference, labels if folded is None else None), self._autocast(latents.device):
            if folded is None:
                prediction = self.backbone.predict(denoiser, rows, time, stacked)
            else:
                prediction = _Predict(self.backbone, denoiser).with_weights(folded, rows, time, stacked)
        prediction = prediction.to(latents.dtype)
        self._scale_cotangents(rows, prediction, reference)
        parts = prediction.chunk(len(branches))
        return ModelOutput(combine_guidance(parts, guidance))

    @contextmanager
    def folded(self, inputs: Inputs) -> Iterator[None]:
        """Within it, calls with exactly the labels of these inputs (B, C) and no graph cost what the reference does, where all
        samples have the same labels: label gains go into the layers' weights once. The prediction is then the same to
        float32's rounding. It changes nothing under guidance, where two samples differ, weights have 16 bits, or the adapter
        has no label gains. Parameters must not change meanwhile. Memory: the adapted layers' weights once more."""
        weights = None
        of_one_branch = inputs.guidance.num_branches == 1
        if self.lora is not None and self.kind == "gains" and of_one_branch and not torch.is_grad_enabled():
            weights = folded_weights(self.denoiser, inputs.labels, self._gain_scale)
        before, self._folded = self._folded, None if weights is None else (inputs.labels, weights)
        try:
            yield
        finally:
            self._folded = before

    def _folded_for(self, labels: Tensor) -> dict[str, Tensor] | None:
        if self._folded is None or self._folded[0] is not labels or torch.is_grad_enabled():
            return None
        return self._folded[1]

    def beside_reference(self, inputs: Inputs) -> Inputs | None:
        """With label gains alone: the samples without labels, which are the reference, below those with them."""
        if self.lora is None or self.kind != "gains":
            return None
        return inputs.repeated(self.controls.null(len(inputs), inputs.labels.device))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the denoiser's blocks in the backward pass, each in the mode its own forward ran in."""

        def run(module: Any, *args: Any) -> Any:
            reference, labels = self._reference, self._labels
            return checkpoint(
                module.__call__,
                *args,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in it is random, and to ask a GPU for its state waits for it
                context_fn=lambda: (nullcontext(), self._mode(reference, labels)),
            )

        for denoiser in (self.denoiser, self.reference_denoiser):
            if denoiser is not None:
                denoiser.enable_gradient_checkpointing(gradient_checkpointing_func=run)  # type: ignore[operator]

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Let torch.compile make the denoiser's repeated blocks faster, each shape for itself; the first calls take minutes.

        A block calls its LoRA with it. What stays outside, embeddings and the first and last layers, is a small share.
        """
        from torch._dynamo import config as dynamo  # a second to import

        blocks = [
            module
            for denoiser in (self.denoiser, self.reference_denoiser)
            if denoiser is not None
            for module in denoiser.modules()
            if type(module).__name__.endswith(_REPEATED_BLOCKS)
        ]
        # every block, for policy and reference, with a graph and without, at the batch of training and that of an evaluation
        dynamo.recompile_limit = max(dynamo.recompile_limit, 8 * len(blocks))
        for block in blocks:
            block.compile(backend=backend, dynamic=False)

    def enable_cotangent_scaling(self) -> None:
        """Scale what is back-propagated through the denoiser, and nothing that is seen outside of it, as fp16 needs."""
        self._cotangent_scale = scale = CotangentScale()
        for parameter in self.trainable_parameters().values():
            parameter.register_hook(scale.leave)

    def scale_adapter(self, scale: float) -> None:
        """Scale LoRA's updates and the control embeddings: 1 as trained (also after another scale), 0 the pre-trained model.

        ConfigError for a fully fine-tuned denoiser, which has nothing to scale.
        """
        if scale == self._scale:
            return
        if self.reference_denoiser is not None:
            raise ConfigError(f"adapter_scale is {scale}, but a fully fine-tuned denoiser has no LoRA to scale; use 1")
        for layer in self._lora_layers:
            layer.scaling[LORA_NAME] = layer.lora_alpha[LORA_NAME] / layer.r[LORA_NAME] * scale
        self._scale = scale

    def parameter_groups(self, learning_rate: float, embedding_learning_rate: float) -> list[dict[str, Any]]:
        """Optimizer groups: LoRA (or the whole denoiser), and the control embeddings, if any, without weight decay."""
        trainable = self.trainable_parameters()
        embedding = [p for name, p in trainable.items() if name.startswith("controls.")]
        denoiser = [p for name, p in trainable.items() if not name.startswith("controls.")]
        groups: list[dict[str, Any]] = [
            {"params": denoiser, "lr": learning_rate, "name": "denoiser"},
            {"params": embedding, "lr": embedding_learning_rate, "weight_decay": 0.0, "name": "control_embeddings"},
        ]
        return [group for group in groups if group["params"]]  # DeepSpeed drops empty ones

    @contextmanager
    def _mode(self, reference: bool, labels: Tensor | None) -> Iterator[None]:
        previous = self._reference, self._labels
        self._set_mode(reference, labels)
        try:
            yield
        finally:
            self._set_mode(*previous)

    def _set_mode(self, reference: bool, labels: Tensor | None) -> None:
        self._labels = labels
        if reference != self._reference:
            self._reference = reference
            switch_adapter(self._lora_layers, LORA_NAME, on=not reference, scale=self._scale)

    def _scale_cotangents(self, rows: Tensor, prediction: Tensor, reference: bool) -> None:
        """The policy's forwards share the scale that its parameters divide by; each of the reference has its own."""
        scale = self._cotangent_scale
        if scale is None or not prediction.requires_grad:
            return
        if reference:
            scale = CotangentScale()
        else:
            scale.forget()
        prediction.register_hook(scale.enter)
        if rows.requires_grad:
            rows.register_hook(scale.leave)

    def _add_control_embedding(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self._reference or self._labels is None:
            return output
        embeddings = self.controls(self._labels)
        if self._scale != 1.0:
            embeddings = self._scale * embeddings
        return output + embeddings.to(output.dtype)

    def _add_label_gains(self, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self._reference or self._labels is None:
            return output
        adapted: Tensor = label_gains(layer)(args[0], output, self._labels, self._gain_scale)
        return adapted

    @property
    def _gain_scale(self) -> float:
        assert self.lora is not None
        return self.lora.alpha / self.lora.rank * self._scale

    def _autocast(self, device: torch.device) -> Any:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self._autocast_dtype)


class _Predict(nn.Module):
    """A backbone's prediction, as a module whose parameters can be others for one call."""

    def __init__(self, backbone: Backbone, denoiser: nn.Module) -> None:
        super().__init__()
        self.backbone, self.denoiser = backbone, denoiser

    def forward(self, rows: Tensor, time: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        return self.backbone.predict(self.denoiser, rows, time, condition)

    def with_weights(
        self, weights: Mapping[str, Tensor], rows: Tensor, time: Tensor, condition: Mapping[str, Tensor]
    ) -> Tensor:
        """weights: by their names in the denoiser."""
        named = {f"denoiser.{name}": weight for name, weight in weights.items()}
        prediction: Tensor = functional_call(self, named, (rows, time, condition), tie_weights=False)
        return prediction


def _stack(rows: list[Tensor]) -> Tensor:
    """Branches one below the other; a single one is not copied."""
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _targets(backbone: Backbone, denoiser: nn.Module, lora: LoraConfig) -> dict[str, nn.Module]:
    """The layers that the config asks to adapt, by name."""
    known = backbone.adapted_layers(denoiser)
    found = [name for name in known if any(f".{name}".endswith(f".{target}") for target in lora.target_modules)]
    if not found:
        endings = sorted({name.removesuffix(".0").rpartition(".")[2] for name in known})
        raise ConfigError(
            f"lora.target_modules {list(lora.target_modules)} are not in this denoiser; expected endings of its layers' "
            f"names; the last parts of those are {', '.join(endings)}"
        )
    return {name: denoiser.get_submodule(name) for name in found}
