"""The augmented model: a frozen denoiser plus LoRA and control embeddings, and the same weights without them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ctrl_ray.config import LoraConfig
from ctrl_ray.diffusion.steps import Guidance, ModelOutput, combine_guidance
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.control.embeddings import ControlEmbeddings
from ctrl_ray.policy.peft_internals import switch_adapters
from ctrl_ray.policy.protocol import Condition, TrainablePolicy


class ControlledPolicy(TrainablePolicy):
    """Policy and reference over one frozen backbone; owns every trainable parameter, so that one engine shards them.

    `reference` is an argument of the forward, never a global toggle: with gradient checkpointing the recomputation
    re-enters the mode of its own forward. LoRA has no dropout, and the backbone stays in eval mode: rollout = sweep.
    At initialisation policy and reference are equal bit for bit (LoRA's B matrices and all tables are zero).
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        num_classes: Mapping[str, int],
        *,
        lora: LoraConfig | None,
        prediction_type: str = "epsilon",
        autocast_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        """num_classes: classes of each control, in label-column order. lora=None: full fine-tuning, with a frozen copy
        of the denoiser as the reference. autocast_dtype: run a float32 denoiser in that precision."""
        super().__init__()
        self.prediction_type = prediction_type
        size = unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        self.latent_shape = (unet.config.in_channels, height, width)
        self._autocast_dtype = autocast_dtype
        self.unet = unet.eval()
        self.reference_unet: UNet2DConditionModel | None = None
        if lora is None:
            self.reference_unet = copy.deepcopy(unet).requires_grad_(False)
            self.unet.requires_grad_(True)
        else:
            self.unet.requires_grad_(False)
            _add_lora(self.unet, lora, seed)
        self.controls = ControlEmbeddings(num_classes, unet.time_embedding.linear_2.out_features)
        self._lora_layers = [module for module in self.unet.modules() if isinstance(module, BaseTunerLayer)]
        self._reference = False
        self._labels: Tensor | None = None
        self.unet.time_embedding.register_forward_hook(self._add_control_embedding)

    def forward(
        self,
        latents: Tensor,
        time: Tensor,
        condition: Condition,
        labels: Tensor,
        guidance: Guidance,
        *,
        reference: bool,
    ) -> ModelOutput:
        """Guided prediction, float32 like the latents (B, C, H, W); labels (B, num_controls), null allowed.

        The unconditional branch of the guidance drops prompt and labels together.
        """
        text, null_text = condition.tensors["text"], condition.tensors["null_text"]
        null = self.controls.null(len(latents), labels.device)
        if guidance.num_branches == 1:
            texts, label_rows = text, labels
        elif guidance.num_branches == 2:
            texts, label_rows = torch.cat([null_text, text]), torch.cat([null, labels])
        else:
            texts, label_rows = torch.cat([null_text, text, text]), torch.cat([null, null, labels])
        rows = latents.repeat(guidance.num_branches, *[1] * (latents.dim() - 1))
        unet = self.reference_unet if reference and self.reference_unet is not None else self.unet
        with self._mode(reference, label_rows), self._autocast(latents.device):
            prediction = unet(
                rows.to(unet.dtype),
                time.to(latents.device),
                encoder_hidden_states=texts.to(unet.dtype),
            ).sample
        branches = prediction.to(latents.dtype).chunk(guidance.num_branches)
        return ModelOutput(combine_guidance(branches, guidance))

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the denoiser's blocks in the backward pass, each in the mode its own forward ran in."""

        def run(module: Any, *args: Any) -> Any:
            reference, labels = self._reference, self._labels
            return checkpoint(
                module.__call__,
                *args,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), self._mode(reference, labels)),
            )

        for unet in (self.unet, self.reference_unet):
            if unet is not None:
                unet.enable_gradient_checkpointing(gradient_checkpointing_func=run)

    @torch.no_grad()
    def scale_adapter(self, scale: float) -> None:
        """Multiply LoRA's updates and the control embeddings by `scale`; 1 changes nothing, 0 gives the pre-trained model.

        ConfigError for a fully fine-tuned denoiser, which has nothing to scale.
        """
        if scale == 1.0:
            return
        if self.reference_unet is not None:
            raise ConfigError(f"adapter_scale is {scale}, but a fully fine-tuned denoiser has no LoRA to scale; use 1")
        for layer in self._lora_layers:
            for name in layer.scaling:
                layer.scaling[name] *= scale
        for name in self.controls.names:
            self.controls.table(name).weight *= scale

    def parameter_groups(self, learning_rate: float, embedding_learning_rate: float) -> list[dict[str, Any]]:
        """Optimizer groups: LoRA (or the whole denoiser), and the control embeddings without weight decay."""
        trainable = self.trainable_parameters()
        embedding = [p for name, p in trainable.items() if name.startswith("controls.")]
        denoiser = [p for name, p in trainable.items() if not name.startswith("controls.")]
        return [
            {"params": denoiser, "lr": learning_rate, "name": "denoiser"},
            {"params": embedding, "lr": embedding_learning_rate, "weight_decay": 0.0, "name": "control_embeddings"},
        ]

    @contextmanager
    def _mode(self, reference: bool, labels: Tensor | None) -> Iterator[None]:
        previous = self._reference, self._labels
        self._set_mode(reference, labels)
        try:
            yield
        finally:
            self._set_mode(*previous)

    def _set_mode(self, reference: bool, labels: Tensor | None) -> None:
        self._reference, self._labels = reference, labels
        switch_adapters(self._lora_layers, on=not reference)

    def _add_control_embedding(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self._reference or self._labels is None:
            return output
        return output + self.controls(self._labels).to(output.dtype)

    def _autocast(self, device: torch.device) -> Any:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self._autocast_dtype)


def _add_lora(unet: UNet2DConditionModel, lora: LoraConfig, seed: int) -> None:
    config = PeftLoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        lora_dropout=0.0,
        init_lora_weights="gaussian",
    )
    state = torch.get_rng_state()
    try:
        torch.manual_seed(seed)  # peft draws from the global generator; every rank must draw the same
        unet.add_adapter(config)
    except ValueError as error:
        raise ConfigError(f"LoRA target modules {lora.target_modules} are not in this denoiser: {error}") from error
    finally:
        torch.set_rng_state(state)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
