"""Sampling from an adapter with the code that trained it: `ControlledPipeline`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ctrl_ray.baselines.methods import make_sampler
from ctrl_ray.baselines.prediction import require_reference
from ctrl_ray.candidates.sampling import CandidatePlan, ChosenPaths, check_density, sample_candidates
from ctrl_ray.candidates.scoring import CandidateScoring
from ctrl_ray.classifiers.classifier import read_control
from ctrl_ray.config import ControlConfig, MethodConfig, Precision, SamplerConfig
from ctrl_ray.config.call import CallConfig
from ctrl_ray.diffusion.generators import Generators, check_noise, generator_noise, image_seeds
from ctrl_ray.diffusion.steps import DenoisingKernel, Guidance
from ctrl_ray.errors import ConfigError
from ctrl_ray.gradients.rollout import NoiseSource, Sampler, Trajectory, rollout
from ctrl_ray.policy.adapter import adapter_backbone, check_base_model
from ctrl_ray.policy.adapter_info import AdapterInfo, adapter_folder, read_adapter_info
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import load_adapted_policy, load_policy_on
from ctrl_ray.policy.call_condition import call_condition
from ctrl_ray.policy.control.labels import ControlValue, label_rows
from ctrl_ray.policy.controlled import ControlledPolicy
from ctrl_ray.policy.decoder import LatentDecoder
from ctrl_ray.policy.device import check_device
from ctrl_ray.policy.outputs import OutputType, check_output_type, finished
from ctrl_ray.policy.precision import sampling_precision, set_float32_precision
from ctrl_ray.policy.protocol import Inputs, TextParts
from ctrl_ray.runs.finished import find_classifiers


class SampledImages(NamedTuple):
    """What a call of the pipeline gives back."""

    images: Any
    """A list of PIL images; or, as `output_type` says, an array (B, H, W, 3) or a tensor (B, 3, H, W) in [0, 1], or the
    clean latents (B, C, h, w)."""
    trajectory: Trajectory
    """How they came about: all latents, and what was asked for."""
    ess: Tensor | None = None
    """With candidates: (B,) float64, the effective sample size of each image's group, 1 … num_candidates; else None. Near 1
    the image may still be far from the target: ask for more candidates, or train the adapter better. It knows nothing of what
    no candidate came near."""


class ControlledPipeline:
    """A text-to-image pipeline that takes `controls={"jpeg_size": 2}`; the other options are those of diffusers' pipelines.

        pipe = ctrl_ray.ControlledPipeline.from_pretrained("runs/shapes/adapter")
        image = pipe("a red circle", controls={"jpeg_size": 3}).images[0]

    It samples by the rollout that training uses, with the sampler that the adapter was trained for (steps, eta, guidance
    scale) unless told otherwise.
    """

    def __init__(
        self,
        policy: ControlledPolicy,
        info: AdapterInfo | None,
        *,
        scheduler: Mapping[str, Any] | None,
        precision: Precision = "fp32",
        scoring: CandidateScoring | None = None,
    ) -> None:
        """info: of the policy's adapter; None: the pre-trained model alone. scheduler: the noise schedule's config; None:
        the base model's. precision: the one that the policy was loaded in. scoring: what candidates are weighed by."""
        self.policy = policy.eval()
        self.info = info
        controls = {} if info is None else info.controls
        self._scoring = scoring or CandidateScoring(controls, {}, None, info)
        self._scheduler = scheduler
        self._precision: Precision = precision
        self._device = torch.device("cpu")
        self._encoder: TextParts | None = None
        self._decoder: LatentDecoder | None = None
        self._diffusers: Any = None
        self._progress: dict[str, Any] = {}
        self._warned: set[str] = set()

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        *,
        base_model: str | None = None,
        device: str | torch.device = "cpu",
        precision: Precision | None = None,
        classifiers: Mapping[str, str | Path] | None = None,
        exponents: Mapping[str, float] | None = None,
    ) -> ControlledPipeline:
        """Load an adapter folder on its base model, or on `base_model` where that has moved.

        classifiers, exponents: for `num_candidates`, by control. None: the classifiers that lie in the adapter, or beside it
        in its run, and guidance_strength / kl_coef as trained.
        precision: of the denoiser; None: on a GPU that of the training, else 'fp32'. On a GPU it also decides about TF32 in
        this whole process (`set_float32_precision`). Raises ModelError for an incomplete folder, a base model that cannot be
        found, or another denoiser than the adapter was trained on (by hash); warns of another VAE or text encoder.
        """
        device, adapter = check_device(device), adapter_folder(adapter)
        info = read_adapter_info(adapter)
        backbone = adapter_backbone(info, base_model)
        warning = check_base_model(info, backbone)
        if warning is not None:
            warnings.warn(warning, UserWarning, stacklevel=2)
        folders = {**find_classifiers(adapter, list(info.controls), {}), **(classifiers or {})}
        scoring = CandidateScoring(info.controls, folders, exponents, info)
        chosen = sampling_precision(precision, info.training, device)
        policy = load_adapted_policy(adapter, info, backbone, info.num_classes, chosen)
        return cls(policy.requires_grad_(False), info, scheduler=info.scheduler, precision=chosen, scoring=scoring).to(
            device
        )

    @classmethod
    def from_base_model(
        cls,
        base_model: str,
        revision: str | None = None,
        *,
        scheduler: Mapping[str, Any] | None = None,
        device: str | torch.device = "cpu",
        precision: Precision = "fp32",
        classifiers: Mapping[str, str | Path] | None = None,
        exponents: Mapping[str, float] | None = None,
    ) -> ControlledPipeline:
        """The pre-trained model alone, for comparison: the same sampler and noise.

        Its only controls are those of `classifiers`, a folder of each, and only `num_candidates` acts on them: no training,
        one image out of many that comes from p_pre(x|c) Π p(y|x,c)^exponent in the limit.

            pipe = ControlledPipeline.from_base_model("shapes", classifiers={"jpeg_size": "runs/shapes/classifier/jpeg_size"})
            pipe("a red circle", controls={"jpeg_size": 3}, num_candidates=16)

        scheduler: another noise schedule than the base model's own, such as `info.scheduler` of an adapter. exponents: of
        each control, 1 where it is not named.
        """
        device = check_device(device)
        backbone = load_backbone(base_model, revision)
        controls = {name: read_control(folder, name) for name, folder in (classifiers or {}).items()}
        scoring = CandidateScoring(controls, classifiers or {}, exponents, None)
        counts = {name: control.num_classes for name, control in controls.items()}
        policy = load_policy_on(backbone, counts, lora=None, precision=precision)
        return cls(policy.requires_grad_(False), None, scheduler=scheduler, precision=precision, scoring=scoring).to(
            device
        )

    @property
    def controls(self) -> dict[str, tuple[str, ...]]:
        """Class names of each control."""
        return {name: control.class_names for name, control in self._control_configs.items()}

    @property
    def sampler(self) -> SamplerConfig:
        """The sampler that the adapter was trained for."""
        return SamplerConfig() if self.info is None else self.info.sampler

    @property
    def _control_configs(self) -> Mapping[str, ControlConfig]:
        return self._scoring.controls

    @property
    def pipeline(self) -> Any:
        """diffusers' own pipeline around the same denoiser, text encoder and VAE, for what its users do to them.

        A LoRA that it loads beside the adapter counts in our calls too, in every step, with the weight that it is given:

            pipe.pipeline.load_lora_weights("style.safetensors", adapter_name="style")

        `adapter_scale` is the scale of ours alone. Its own calls know nothing of controls.
        """
        if self._diffusers is None:
            parts = {self.policy.backbone.denoiser: self.policy.denoiser, "vae": self._vae().vae, **self._text().parts}
            self._diffusers = self.policy.backbone.load_pipeline(**parts)
        return self._diffusers

    def to(self, device: str | torch.device) -> ControlledPipeline:
        """Move all parts to a device; ConfigError names those that are here where it is not."""
        self._device = check_device(device)
        if self._device.type == "cuda":
            set_float32_precision(self._precision)
        self.policy.to(self._device)
        for part in (self._encoder, self._decoder):
            if part is not None:
                part.to(self._device)
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options of the bar over denoising steps (tqdm's), such as `disable=True`."""
        self._progress = kwargs

    def labels(self, controls: Mapping[str, ControlValue | Sequence[ControlValue]] | None, num_prompts: int) -> Tensor:
        """Labels (num_prompts, C) of named controls (see `label_rows`); ConfigError for what the adapter does not have."""
        return label_rows(controls or {}, self._control_configs, num_prompts)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        controls: Mapping[str, ControlValue | Sequence[ControlValue]] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        control_scale: float | None = None,
        eta: float | None = None,
        adapter_scale: float = 1.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        negative_pooled_prompt_embeds: Tensor | None = None,
        output_type: OutputType = "pil",
        on_step: Callable[[int, Tensor], None] | None = None,
        draw: Sampler = rollout,
        method: MethodConfig | None = None,
        num_candidates: int = 1,
        candidate_batch_size: int | None = None,
    ) -> SampledImages:
        """Sample images.

        Args:
            prompt: One, or one for each image; or give `prompt_embeds` (B, tokens, width) in its place, and for Stable
                Diffusion XL `pooled_prompt_embeds` (B, width) beside them.
            controls: Class (index or name) per control, for all prompts or one for each; omitted or None = null.
            negative_prompt: In the place of the empty prompt, where there is guidance (`negative_prompt_embeds` likewise).
            height, width: In pixels; None: what the base model was trained for. Multiples of the VAE's factor.
            num_inference_steps, guidance_scale, control_scale, eta: None = as trained (`SamplerConfig`). Other values work, but
                the guarantee of the method holds for the trained sampler only, so each is warned about once.
            adapter_scale: Scales LoRA and control embeddings; 0 is the pre-trained model.
            generator: One for all images or one for each; x_T is drawn first, then the noise of each step.
            latents: x_T, (B, C, h, w), in the place of the first draw.
            output_type: 'pil', 'np', 'pt' or 'latent'; see `SampledImages`.
            on_step: Told each step's index and its next latents.
            draw: How trajectories are drawn; `rollout` is the plain sampler.
            method: A sampler of `ctrl_ray.baselines` that steers the pre-trained model to `controls` by its classifiers, such
                as MethodConfig(name="dps", scale=5.0); only where there is no adapter. The trajectory has the KL and log-ratio
                to the pre-trained model where the path's density is known.
            num_candidates: K above 1 draws K paths for each image, some of them the pre-trained model's, and keeps one by
                its weight for the target (`ctrl_ray.candidates`): about 2 K times the cost, and the exact target as K grows.
                The noise of candidate j depends on j and one number drawn from the image's generator alone.
            candidate_batch_size: Candidates sampled at a time; None: as many as images.

        Raises ConfigError for unknown controls and classes, numbers out of range (`CallConfig`), sizes that the model cannot
        make, and numbers of generators or latents that are not those of the images; NonFiniteError where latents or images
        are NaN or infinite. Warns of images that are black.
        """
        check_output_type(output_type)
        call = CallConfig(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            control_scale=control_scale,
            eta=eta,
            adapter_scale=adapter_scale,
            height=height,
            width=width,
            num_images_per_prompt=num_images_per_prompt,
            num_candidates=num_candidates,
            candidate_batch_size=candidate_batch_size,
        )
        sampler = call.sampler(self.sampler)
        if method is not None and method.steers:
            sampler = method.sampler(sampler)
        kernel = self.policy.backbone.make_kernel(sampler, self._scheduler)
        self._warn_of(sampler)
        condition = call_condition(
            self.policy.backbone,
            self._text(),
            self._device,
            prompt,
            negative_prompt,
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
        )
        labels = self.labels(controls, len(condition))
        rows = [row for row in range(len(condition)) for _ in range(num_images_per_prompt)]
        self.policy.scale_adapter(call.adapter_scale)
        inputs = Inputs(condition.select(rows), labels[rows].to(self._device), Guidance.of(sampler))
        shape = self._latent_shape(call.height, call.width)
        prompts_known = prompt is not None
        if num_candidates > 1:
            self._check_alone(draw, method, num_candidates)
            check_noise(len(rows), shape, generator, latents)
            share = None if self.info is None or adapter_scale == 0 else self._scoring.share
            size = len(rows) if candidate_batch_size is None else candidate_batch_size
            plan = CandidatePlan(len(rows), num_candidates, share, size)
            seeds = image_seeds(len(rows), generator)
            path = self._candidates(kernel, inputs, plan, seeds, shape, latents, on_step, prompts_known)
            return SampledImages(self._images(path.trajectory, output_type, generator), path.trajectory, path.ess)
        noise = generator_noise(len(rows), shape, generator, latents, self._device)
        if method is not None and method.steers:
            trajectory = self._steered(method, kernel, inputs, noise, on_step, prompts_known)
        else:
            if self.info is None and self.controls and self._scoring.asked(labels):
                raise ConfigError(
                    "the pre-trained model alone follows no control unless num_candidates (--candidates) is above 1, or a "
                    "method (--method.name) steers it; got 1 and none"
                )
            with self._bar(kernel.num_steps, on_step) as told, self.policy.folded(inputs):
                trajectory = draw(self.policy, kernel, inputs, noise, reference=self.info is None, on_step=told)
        return SampledImages(self._images(trajectory, output_type, generator), trajectory)

    @staticmethod
    def _check_alone(draw: Sampler, method: MethodConfig | None, num_candidates: int) -> None:
        """ConfigError where candidates are asked for and another way to draw them."""
        if draw is not rollout or (method is not None and method.steers):
            raise ConfigError(
                f"num_candidates is {num_candidates}, but `draw` is not the plain sampler: the density of its paths is not "
                "known, so they have no weights; leave draw and method (--method.name) out"
            )

    def _candidates(
        self,
        kernel: DenoisingKernel,
        inputs: Inputs,
        plan: CandidatePlan,
        seeds: Sequence[int],
        shape: tuple[int, ...],
        latents: Tensor | None,
        on_step: Callable[[int, Tensor], None] | None,
        prompts_known: bool,
    ) -> ChosenPaths:
        check_density(kernel, plan)
        exponents = self._scoring.exponents(inputs.labels)
        rewards = self._scoring.rewards(inputs.labels, self._vae(), self._device, prompts_known=prompts_known)
        with self._bar(len(plan.chunks()) * kernel.num_steps, on_step) as told:
            return sample_candidates(
                *(self.policy, kernel, inputs, rewards, exponents, seeds, shape, plan),
                initial_noise=latents,
                on_step=told,
                precision=self._precision,
            )

    def _steered(
        self,
        method: MethodConfig,
        kernel: DenoisingKernel,
        inputs: Inputs,
        noise: NoiseSource,
        on_step: Callable[[int, Tensor], None] | None,
        prompts_known: bool,
    ) -> Trajectory:
        """Trajectories of the pre-trained model, steered by the classifiers."""
        require_reference(kernel, method.name, reference=self.info is None)
        exponents = self._scoring.exponents(inputs.labels, method.why)
        rewards = self._scoring.rewards(
            inputs.labels, self._vae(), self._device, prompts_known=prompts_known, every_column=True, why=method.why
        )
        draw = make_sampler(method, list(exponents.values()), list(exponents))
        known = method.name not in ("rejection", "best_of_n")  # they take all steps once for each try
        with self._bar(kernel.num_steps if known else None, on_step) as told:
            return draw(self.policy, kernel, inputs, noise, rewards, reference=True, with_kl=True, on_step=told)

    @contextmanager
    def _bar(
        self, num_steps: int | None, on_step: Callable[[int, Tensor], None] | None
    ) -> Iterator[Callable[[int, Tensor], None]]:
        with tqdm(total=num_steps, **self._progress) as bar:

            def told(step_index: int, latents: Tensor) -> None:
                bar.update()
                if on_step is not None:
                    on_step(step_index, latents)

            yield told

    def _warn_of(self, sampler: SamplerConfig) -> None:
        """Of each setting that is not as trained, once."""
        for name in ("num_steps", "guidance_scale", "control_scale", "eta"):
            value, trained = getattr(sampler, name), getattr(self.sampler, name)
            if value == trained or self.info is None or name in self._warned:
                continue
            self._warned.add(name)
            warnings.warn(
                f"{name} is {value}, but the adapter was trained with {trained}: its guarantee holds for {trained} only",
                UserWarning,
                stacklevel=4,  # past torch.no_grad's frame
            )

    def _text(self) -> TextParts:
        if self._encoder is None:
            self._encoder = self.policy.backbone.load_encoder(self._device)
        if self._diffusers is not None:  # others may have changed the text encoder since
            self._encoder.forget()
        return self._encoder

    def _latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        channels, *sides = self.policy.latent_shape
        factor = self._vae().downsampling
        for index, (name, pixels) in enumerate((("height", height), ("width", width))):
            if pixels is None:
                continue
            if pixels % factor:
                raise ConfigError(f"{name} is {pixels}; expected a positive multiple of {factor}")
            sides[index] = pixels // factor
        return (channels, *sides)

    def _vae(self) -> LatentDecoder:
        if self._decoder is None:
            self._decoder = self.policy.backbone.load_decoder(device=self._device)
        return self._decoder

    def _images(self, trajectory: Trajectory, output_type: OutputType, generator: Generators) -> Any:
        latents = trajectory.clean_latents
        of_images = generator if isinstance(generator, Sequence) else [None] * len(latents)
        return finished(
            latents,
            self._vae,
            output_type,
            prompts=trajectory.inputs.condition.prompts,
            seeds=[None if one is None else one.initial_seed() for one in of_images],
            precision=self._precision,
            warn_frame=3,  # past __call__ and torch.no_grad's frame
        )
