"""Sampling from an adapter: diffusers' own Stable Diffusion pipeline plus the controls."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ctrl_ray.config import ControlConfig
from ctrl_ray.diffusion.steps import Guidance, combine_guidance
from ctrl_ray.errors import ConfigError, ModelError
from ctrl_ray.policy.adapter import (
    LORA_FILE,
    UNET_FOLDER,
    AdapterInfo,
    check_base_model,
    read_adapter_info,
    read_embeddings,
)
from ctrl_ray.policy.backbones.stable_diffusion import ddim_scheduler, load_scheduler, load_unet
from ctrl_ray.policy.base_model import resolve_base_model
from ctrl_ray.policy.control.embeddings import ControlEmbeddings
from ctrl_ray.policy.peft_internals import switch_adapters

_ADAPTER_NAME = "ctrl_ray"
ControlValue = int | str | None


def class_index(name: str, control: ControlConfig, value: ControlValue) -> int:
    """Label of a class given by name, by index (also as text, '2'), or None for null.

    Raises ConfigError that lists the classes.
    """
    if value is None:
        return control.num_classes
    if isinstance(value, str):
        if value in control.class_names:
            return control.class_names.index(value)
        index = int(value) if value.isdecimal() else -1
    else:
        try:
            index = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:
            index = -1
    if not 0 <= index < control.num_classes:
        classes = ", ".join(f"{i} = {class_name!r}" for i, class_name in enumerate(control.class_names))
        raise ConfigError(f"class {value!r} of control {name!r} does not exist; expected one of {classes}, or None")
    return index


def load_base_pipeline(
    base_model: str,
    revision: str | None = None,
    *,
    scheduler_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    **components: Any,
) -> StableDiffusionPipeline:
    """The pre-trained pipeline with the DDIM scheduler that training uses, on the CPU.

    `scheduler_config`: another noise schedule than the pipeline's own; `components` replace parts (`unet=...`).
    """
    own = scheduler_config is None
    scheduler = load_scheduler(base_model, revision) if own else ddim_scheduler(dict(scheduler_config or {}))
    return StableDiffusionPipeline.from_pretrained(
        resolve_base_model(base_model, revision),
        dtype=dtype,
        use_safetensors=True,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **components,
    )


class ControlledPipeline:
    """A diffusers pipeline that takes `controls={"jpeg_size": 2}` besides its own arguments.

    Defaults are what the adapter was trained for (steps, eta, guidance scale). `pipeline` is the diffusers pipeline
    inside; called directly, it samples the adapter with all controls null.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        info: AdapterInfo,
        tables: Mapping[str, Tensor],
        *,
        reference_unet: UNet2DConditionModel | None = None,
    ) -> None:
        """reference_unet: the pre-trained denoiser, where the pipeline's own was fully fine-tuned."""
        self.pipeline = pipeline
        self.info = info
        self._lora_layers = [layer for layer in pipeline.unet.modules() if isinstance(layer, BaseTunerLayer)]
        self._reference_unet = reference_unet
        self._by_reference = False
        self._embeddings = ControlEmbeddings(info.num_classes, pipeline.unet.time_embedding.linear_2.out_features)
        self._embeddings.load_state_dict({f"tables.{name}.weight": table for name, table in tables.items()})
        self._embeddings.requires_grad_(False)
        self._labels: Tensor | None = None
        self._scale = 1.0
        self._guidance = Guidance()
        self._warned: set[str] = set()
        pipeline.unet.time_embedding.register_forward_hook(self._add_control_embedding)
        pipeline.unet.register_forward_pre_hook(self._enter_step, with_kwargs=True)
        pipeline.unet.register_forward_pre_hook(self._add_branch, with_kwargs=True)
        pipeline.unet.register_forward_hook(self._take_reference, with_kwargs=True)
        pipeline.unet.register_forward_hook(self._combine_branches)

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        *,
        base_model: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ControlledPipeline:
        """Load an adapter folder on its base model, or on `base_model` where that has moved.

        Raises ModelError for an incomplete folder, a base model that cannot be found, or another one than the adapter
        was trained on (by hash).
        """
        info = read_adapter_info(adapter)
        folder = resolve_base_model(base_model or info.base_model, None if base_model else info.base_revision)
        check_base_model(info, folder)
        tables = read_embeddings(adapter, info)
        components = {} if info.lora is not None else {"unet": _load_finetuned_unet(Path(adapter), dtype)}
        pipeline = load_base_pipeline(folder, scheduler_config=info.scheduler, dtype=dtype, **components)
        if info.lora is not None:
            if not (Path(adapter) / LORA_FILE).is_file():
                raise ModelError(f"{Path(adapter) / LORA_FILE} does not exist; the adapter folder is incomplete")
            pipeline.load_lora_weights(str(adapter), weight_name=LORA_FILE, adapter_name=_ADAPTER_NAME)
        reference = None
        if info.lora is None and info.sampler.reference_steps:
            reference = load_unet(folder, dtype=dtype)
        return cls(pipeline, info, tables, reference_unet=reference).to(device)

    @property
    def controls(self) -> dict[str, tuple[str, ...]]:
        """Class names of each control."""
        return {name: control.class_names for name, control in self.info.controls.items()}

    def to(self, *args: Any, **kwargs: Any) -> ControlledPipeline:
        """Move the pipeline (diffusers' `to`); the embeddings follow the denoiser at each call."""
        self.pipeline.to(*args, **kwargs)
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """diffusers' `set_progress_bar_config`, such as `disable=True`."""
        self.pipeline.set_progress_bar_config(**kwargs)

    def labels(self, controls: Mapping[str, ControlValue | Sequence[ControlValue]] | None, num_prompts: int) -> Tensor:
        """Labels (num_prompts, C) of named controls, each one class or one class per prompt; omitted ones are null.

        Raises ConfigError for a control or class that the adapter does not have.
        """
        controls = dict(controls or {})
        unknown = [name for name in controls if name not in self.info.controls]
        if unknown:
            raise ConfigError(f"unknown control {unknown[0]!r}; this adapter has {list(self.info.controls)}")
        columns = []
        for name, control in self.info.controls.items():
            value = controls.get(name)
            single = value is None or isinstance(value, str) or not hasattr(value, "__len__")
            values: Sequence[Any] = [value] * num_prompts if single else value  # type: ignore[assignment]
            if len(values) != num_prompts:
                raise ConfigError(
                    f"control {name!r} has {len(values)} classes for {num_prompts} prompts; give one for each, or one "
                    "for all"
                )
            columns.append([class_index(name, control, one) for one in values])
        return torch.tensor(columns, dtype=torch.long).reshape(-1, num_prompts).T

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        controls: Mapping[str, ControlValue | Sequence[ControlValue]] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        eta: float | None = None,
        adapter_scale: float = 1.0,
        **kwargs: Any,
    ) -> Any:
        """Sample as `StableDiffusionPipeline.__call__` does; what is not named here goes to it unchanged.

        controls: class (index or name) per control, for all prompts or one for each; omitted or None = null.
        num_inference_steps, guidance_scale, eta: None = as trained. Other values work, but the guarantee of the method
        holds for the trained sampler only, so each is warned about once. adapter_scale: scales LoRA and control
        embeddings; 0 is the pre-trained model. Raises ConfigError for unknown controls and classes, and for a guidance
        scale below 1, which diffusers would silently take as 1.
        """
        if prompt is None:
            num_prompts = len(kwargs["prompt_embeds"]) if kwargs.get("prompt_embeds") is not None else 1
        else:
            num_prompts = 1 if isinstance(prompt, str) else len(prompt)
        labels = self.labels(controls, num_prompts).repeat_interleave(num_images_per_prompt, dim=0)
        settings = {
            "num_inference_steps": self._setting("num_steps", num_inference_steps),
            "guidance_scale": self._setting("guidance_scale", guidance_scale),
            "eta": self._setting("eta", eta),
        }
        if settings["guidance_scale"] < 1:
            raise ConfigError(f"guidance_scale is {settings['guidance_scale']}; expected at least 1 (1 = off)")
        self._set_adapter_scale(adapter_scale)
        self._embeddings.to(self.pipeline.unet.device)
        self._labels = labels.to(self.pipeline.unet.device)
        self._guidance = Guidance(settings["guidance_scale"], self.info.sampler.control_scale)
        try:
            return self.pipeline(prompt, num_images_per_prompt=num_images_per_prompt, **settings, **kwargs)
        finally:
            self._labels = None
            self._set_by_reference(False)

    def _setting(self, name: str, value: Any) -> Any:
        trained = getattr(self.info.sampler, name)
        if value is None or value == trained:
            return trained
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(
                f"{name} is {value}, but the adapter was trained with {trained}: its guarantee holds for {trained} only",
                UserWarning,
                stacklevel=4,  # past torch.no_grad's frame
            )
        return value

    def _set_adapter_scale(self, scale: float) -> None:
        if scale == self._scale:
            return
        if not self._lora_layers:
            raise ConfigError(f"adapter_scale is {scale}, but a fully fine-tuned denoiser has no LoRA to scale; use 1")
        self.pipeline.set_adapters(_ADAPTER_NAME, scale)
        self._scale = scale

    def _add_control_embedding(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """Rows are samples, or (unconditional, [prompt only,] prompt and labels) × samples: labels go to the last."""
        if self._labels is None or self._by_reference:
            return output
        null = self._embeddings.null(len(output) - len(self._labels), output.device)
        return output + self._scale * self._embeddings(torch.cat([null, self._labels])).to(output.dtype)

    def _enter_step(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """The trained sampler's last `reference_steps` are the pre-trained model's, as they were in training."""
        count = self.info.sampler.reference_steps
        if self._labels is not None and count:
            last = self.pipeline.scheduler.timesteps[-count:].tolist()
            self._set_by_reference(int(args[1]) in last)

    def _set_by_reference(self, by_reference: bool) -> None:
        self._by_reference = by_reference
        switch_adapters(self._lora_layers, on=not by_reference)

    def _take_reference(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        """After full fine-tuning there is no adapter to switch off: ask the pre-trained denoiser instead."""
        if not self._by_reference or self._reference_unet is None:
            return output
        return self._reference_unet.to(args[0].device)(*args, **kwargs)

    def _add_branch(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """With a control scale of its own: a prompt-only branch before the rows that have labels."""
        if self._labels is None or self._guidance.control_scale is None:
            return None
        sample, *rest = args
        count = len(self._labels)
        texts = kwargs["encoder_hidden_states"]
        return (torch.cat([sample, sample[-count:]]), *rest), {
            **kwargs,
            "encoder_hidden_states": torch.cat([texts, texts[-count:]]),
        }

    def _combine_branches(self, module: nn.Module, args: Any, output: Any) -> Any:
        """The prediction that, guided by diffusers with one scale, is guided with both scales."""
        if self._labels is None or self._guidance.control_scale is None:
            return output
        rows = output[0].split(len(self._labels))
        if len(rows) == 2:  # diffusers has switched guidance off: the prompt's scale is 1
            return (rows[0] + self._guidance.control_scale * (rows[1] - rows[0]),)
        wanted = combine_guidance(rows, self._guidance)
        return (torch.cat([rows[0], rows[0] + (wanted - rows[0]) / self._guidance.scale]),)


def _load_finetuned_unet(adapter: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    if not (adapter / UNET_FOLDER / "config.json").is_file():
        raise ModelError(f"{adapter / UNET_FOLDER} does not exist; the adapter folder is incomplete")
    unet = UNet2DConditionModel.from_pretrained(adapter, subfolder=UNET_FOLDER, dtype=dtype, use_safetensors=True)
    return unet.eval()
