"""What belongs to a family of base models and not to the method: one class a family, in a file of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ctrl_ray.config import SamplerConfig
from ctrl_ray.config.values import require
from ctrl_ray.diffusion.steps import DenoisingKernel
from ctrl_ray.policy.backbones.text import TextEncoder, text_elements
from ctrl_ray.policy.decoder import LatentDecoder
from ctrl_ray.policy.identity import PartIdentity, part_identity
from ctrl_ray.policy.pipeline_files import check_stored, check_weights, naming_part, read_json
from ctrl_ray.policy.schedule import check_schedule, ddim_scheduler, load_kernel


class NoiseLevels(NamedTuple):
    """What a denoiser was trained on: at timestep t (an integer) it saw signal[t] x_0 + noise[t] ε."""

    signal: Tensor
    """(T,) float64."""
    noise: Tensor
    """(T,) float64."""
    prediction_type: str
    """'epsilon', 'v_prediction', 'sample' or 'flow': what it predicts of that."""


Row = Literal["sample", "token"]
"""What a row of a layer's output belongs to: a sample (B, width), or one of several tokens or pixels of a sample."""


class Backbone(Protocol):
    """A pre-trained pipeline of one family, in a folder; nothing is loaded before a method loads it.

    The policy keeps LoRA, the switch to the reference, the branches of the guidance and the control embeddings, and asks the
    backbone for what differs between families. `DiffusersBackbone` has what all families in diffusers' format share.
    """

    folder: str
    """Where the pipeline lies (`model_index.json`)."""
    denoiser: ClassVar[str]
    """'unet' or 'transformer': sub-folder of the denoiser, prefix of its parameters, and key of its LoRA."""
    loading_options: ClassVar[str]
    """What people give diffusers' `from_pretrained` besides the folder, as they would write it."""
    usage_imports: ClassVar[tuple[str, ...]]
    """Lines that import what `usage_scheduler` needs, beside json and the pipeline."""

    @property
    def pipeline_class(self) -> Any:
        """diffusers' pipeline of the family; it reads and writes LoRA."""
        ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Latents of one sample, (channels, height, width), of the sampler's size; else of what the model was trained for."""
        ...

    def image_size(self) -> tuple[int, int]:
        """(height, width) of an image of such latents, in pixels."""
        ...

    def identities(self) -> dict[str, PartIdentity]:
        """What the parts with weights are known by, the denoiser first, by sub-folder."""
        ...

    def check(self) -> None:
        """ModelError where a part of the pipeline is missing, damaged or not of this family; loads no weights."""
        ...

    def check_size(self) -> None:
        """ConfigError where the family cannot make images or texts of the sampler's size."""
        ...

    def scheduler_config(self) -> dict[str, Any]:
        """The noise schedule, as an adapter stores it."""
        ...

    def check_schedule(self, config: Mapping[str, Any], whose: str) -> None:
        """ModelError unless a scheduler's config is a noise schedule of this family; whose: for the message."""
        ...

    def make_kernel(self, sampler: SamplerConfig, scheduler_config: Mapping[str, Any] | None = None) -> DenoisingKernel:
        """The sampler's chain of Gaussian steps; `scheduler_config`: another noise schedule than the pipeline's own."""
        ...

    def noise_levels(self) -> NoiseLevels:
        """The noise that the denoiser was trained on."""
        ...

    def prepare_call(self, pipeline: Any, sampler: SamplerConfig, generator: torch.Generator) -> dict[str, Any]:
        """Let diffusers' pipeline draw with the sampler's noise; what its call is given for that."""
        ...

    def usage_scheduler(self, sampler: SamplerConfig) -> tuple[str, str]:
        """How people write it: (the scheduler from SCHEDULER, its config; what the call is given, with a comma at its end)."""
        ...

    def load_denoiser(self, dtype: torch.dtype = torch.float32, *, empty: bool = False) -> nn.Module:
        """The frozen denoiser in eval mode; `empty`: shapes and types alone, on torch's meta device."""
        ...

    def load_finetuned(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        """A denoiser that full fine-tuning left in `folder`/<denoiser>."""
        ...

    def num_tokens(self, prompts: Sequence[str]) -> tuple[list[int], int]:
        """(tokens of each prompt, how many the text encoder reads): what is beyond is lost."""
        ...

    def load_encoder(self, device: str | torch.device = "cpu") -> TextEncoder:
        """Prompts to conditions; frozen, float32."""
        ...

    def encoder_bytes(self, *, on_gpu: bool) -> int:
        """Weights of the text encoders as `load_encoder` holds them."""
        ...

    def load_decoder(
        self, chunk_size: int = 32, device: str | torch.device = "cpu", *, empty: bool = False
    ) -> LatentDecoder:
        """Latents to images, with gradients; frozen, float32. `empty`: as in `load_denoiser`."""
        ...

    def load_pipeline(self, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
        """diffusers' own pipeline with the scheduler of `make_kernel`, on the CPU; `parts` by name are taken, not loaded;
        settings of the pipeline may be among them."""
        ...

    def embedded(self, prompt_embeds: Tensor, pooled: Tensor | None = None) -> dict[str, Tensor]:
        """A condition's tensors from embeddings of the kind that diffusers' pipelines take; pooled: for the families that have
        some. ConfigError where they are missing or too many."""
        ...

    def condition_shapes(self, batch_size: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a condition's tensors, for counting without weights."""
        ...

    def predict(self, denoiser: nn.Module, latents: Tensor, time: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The denoiser's prediction for latents (R, ...) and a condition's tensors, each (R, ...), in its own precision."""
        ...

    def output_layers(self, denoiser: nn.Module) -> Sequence[nn.Module]:
        """The last norm and the last convolution or projection, which stay float32 in a denoiser of 16 bits."""
        ...

    def embedding_point(self, denoiser: nn.Module) -> tuple[nn.Module, int]:
        """(module, width): the control embeddings, (R, width), are added to this module's output."""
        ...

    def adapted_layers(self, denoiser: nn.Module) -> dict[str, Row]:
        """Layers that can take LoRA, by name, and what a row of each belongs to."""
        ...


class DiffusersBackbone:
    """What all families in diffusers' format share: folders, scheduler, pipeline."""

    denoiser: ClassVar[str]
    frozen_parts: ClassVar[tuple[str, ...]]
    """Sub-folders of the other parts that have weights."""
    loading_options: ClassVar[str] = ""
    usage_imports: ClassVar[tuple[str, ...]] = ("from diffusers import DDIMScheduler",)
    reads_any_length: ClassVar[bool] = False
    """Whether the family knows `sampler.max_sequence_length`."""

    def __init__(self, folder: str, sampler: SamplerConfig | None = None) -> None:
        """sampler: says the size of images and texts; None: the model's own."""
        self.folder = folder
        self._sampler = sampler or SamplerConfig()

    def component_config(self, component: str) -> dict[str, Any]:
        """config.json of one of the pipeline's parts."""
        file = Path(self.folder) / component / ("scheduler_config.json" if component == "scheduler" else "config.json")
        return read_json(file, f"the configuration of its {component}")

    def check(self) -> None:
        """ModelError where a part is missing, damaged or of another family; reads configurations and headers alone."""
        folder = Path(self.folder)
        self.check_schedule(self.component_config("scheduler"), f"base model {folder}")
        for part in (self.denoiser, *self.frozen_parts):
            self.component_config(part)
            check_weights(folder / part)

    def check_schedule(self, config: Mapping[str, Any], whose: str) -> None:
        """See `Backbone`."""
        check_schedule(config, whose)

    def identities(self) -> dict[str, PartIdentity]:
        """See `Backbone`."""
        return {part: part_identity(self.folder, part) for part in (self.denoiser, *self.frozen_parts)}

    @property
    def pipeline_class(self) -> Any:
        """See `Backbone`."""
        raise NotImplementedError

    @property
    def denoiser_class(self) -> Any:
        """diffusers' class of the denoiser."""
        raise NotImplementedError

    @property
    def trained_shape(self) -> tuple[int, ...]:
        """Latents of one sample at the size that the model was trained for, (channels, height, width)."""
        raise NotImplementedError

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """See `Backbone`."""
        height, width = self._sampler.height, self._sampler.width
        if height is None or width is None:
            return self.trained_shape
        return (self.trained_shape[0], height // self.pixels_per_latent(), width // self.pixels_per_latent())

    def size_unit(self) -> int:
        """Pixels that each side of an image is a multiple of."""
        return self.pixels_per_latent()

    def check_size(self) -> None:
        """See `Backbone`."""
        unit, name = self.size_unit(), f"base model {self.folder}"
        for side in ("height", "width"):
            pixels = getattr(self._sampler, side)
            require(
                pixels is None or pixels % unit == 0,
                f"sampler.{side} is {pixels}, but {name} makes images of multiples of {unit} pixels; give one",
            )
        length = self._sampler.max_sequence_length
        require(
            length is None or self.reads_any_length,
            f"sampler.max_sequence_length is {length}, but {name} reads texts of one length; leave it out",
        )

    def pixels_per_latent(self) -> int:
        """Along each side, of diffusers' AutoencoderKL in `vae`."""
        return int(2 ** (len(self.component_config("vae")["block_out_channels"]) - 1))

    def image_size(self) -> tuple[int, int]:
        """See `Backbone`."""
        height, width = self.latent_shape[1:]
        return height * self.pixels_per_latent(), width * self.pixels_per_latent()

    @cached_property
    def scheduler(self) -> Any:
        """DDIM with the pipeline's noise schedule (see `ddim_scheduler`)."""
        return ddim_scheduler(self.component_config("scheduler"))

    def scheduler_config(self) -> dict[str, Any]:
        """See `Backbone`."""
        return dict(self.scheduler.config)

    def make_kernel(self, sampler: SamplerConfig, scheduler_config: Mapping[str, Any] | None = None) -> DenoisingKernel:
        """See `Backbone`."""
        require(
            sampler.flow_sde == "ancestral",
            f"sampler.flow_sde is {sampler.flow_sde!r}, but base model {self.folder} was not trained by flow matching; leave "
            "it out",
        )
        return load_kernel(self.scheduler if scheduler_config is None else ddim_scheduler(scheduler_config), sampler)

    def noise_levels(self) -> NoiseLevels:
        """See `Backbone`."""
        alphas: Tensor = self.scheduler.alphas_cumprod.double()
        return NoiseLevels(alphas.sqrt(), (1 - alphas).sqrt(), self.scheduler.config.prediction_type)

    def load_pipeline(self, dtype: torch.dtype = torch.float32, **parts: Any) -> Any:
        """See `Backbone`."""
        return self.pipeline_class.from_pretrained(
            self.folder,
            dtype=dtype,
            use_safetensors=True,
            scheduler=self.scheduler,
            **parts,
        )

    def prepare_call(self, pipeline: Any, sampler: SamplerConfig, generator: torch.Generator) -> dict[str, Any]:
        """See `Backbone`."""
        return {"eta": sampler.eta, "generator": generator, **sampler.call_options()}

    def usage_scheduler(self, sampler: SamplerConfig) -> tuple[str, str]:
        """See `Backbone`."""
        return "DDIMScheduler.from_config(SCHEDULER)", f"eta={sampler.eta:g}, "

    def encoder_bytes(self, *, on_gpu: bool) -> int:
        """See `Backbone`: float32."""
        return 4 * sum(text_elements(part) for part in sorted(Path(self.folder).glob("text_encoder*")))

    def load_denoiser(self, dtype: torch.dtype = torch.float32, *, empty: bool = False) -> nn.Module:
        """See `Backbone`."""
        if not empty:
            return self.load_finetuned(self.folder, dtype)
        folder, made = Path(self.folder) / self.denoiser, self.denoiser_class
        with naming_part(folder), torch.device("meta"):
            denoiser: nn.Module = made.from_config(made.load_config(folder))
        check_stored(folder, denoiser)
        nn.Module.to(denoiser, dtype)  # diffusers' own warns of submodules to keep in float32, also where there is none
        return denoiser.eval().requires_grad_(False)

    def load_finetuned(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        """See `Backbone`."""
        place = Path(folder) / self.denoiser
        check_weights(place)
        with naming_part(place):
            denoiser: nn.Module = self.denoiser_class.from_pretrained(
                folder, subfolder=self.denoiser, dtype=dtype, use_safetensors=True
            )
        check_stored(place, denoiser)
        return denoiser.eval().requires_grad_(False)

    def load_decoder(
        self, chunk_size: int = 32, device: str | torch.device = "cpu", *, empty: bool = False
    ) -> LatentDecoder:
        """See `Backbone`: diffusers' AutoencoderKL in `vae`."""
        from diffusers import AutoencoderKL

        folder = Path(self.folder) / "vae"
        if empty:
            with naming_part(folder), torch.device("meta"):
                vae = AutoencoderKL.from_config(self.component_config("vae"))
            check_stored(folder, vae)
            return LatentDecoder(vae, chunk_size)
        with naming_part(folder):
            vae = AutoencoderKL.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        check_stored(folder, vae)
        return LatentDecoder(vae, chunk_size).to(device)
