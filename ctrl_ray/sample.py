"""`python -m ctrl_ray.sample --adapter RUN/adapter --prompt "a red circle" --control jpeg_size=2 --output-dir OUT`."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ctrl_ray import command, embedded
from ctrl_ray.config import ControlConfig, MethodConfig, Precision, SamplerConfig
from ctrl_ray.config.call import CallConfig
from ctrl_ray.config.fields import at_least, check_fields
from ctrl_ray.errors import ConfigError, InterruptedRunError, naming_memory

if TYPE_CHECKING:
    from ctrl_ray.pipeline import ControlledPipeline, SampledImages
    from ctrl_ray.policy.adapter_info import AdapterInfo
    from ctrl_ray.policy.backbones.base import Backbone


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Sample images with an adapter or, with --base, from its pre-trained model with the same noise."""

    adapter: str | None = None
    """Adapter folder, such as RUN/adapter. Its sampler settings are used, unless a flag below changes them."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    prompts_file: str | None = None
    """Text file with one prompt per line, instead of --prompt."""
    encoding: str = "utf-8"
    """Encoding of prompts_file, such as cp1252. A byte order mark in the file has priority."""
    control: tuple[str, ...] = ()
    """NAME=CLASS for each control, such as jpeg_size=2. CLASS is an index or a name. Controls that you do not name
    get the null label."""
    num_images: Annotated[int, at_least(1)] = 16
    """Images in total. The prompts take turns."""
    seed: Annotated[int, at_least(-1)] = 0
    """The seed of image i is made from this seed and i. It does not depend on batch_size or num_images."""
    output_dir: str = "samples"
    """Folder of the PNGs and of their manifest.jsonl."""
    batch_size: Annotated[int, at_least(1)] = 32
    """Images sampled at a time. It limits the memory."""
    base: bool = False
    """Sample from the pre-trained model, for pictures before and after: same noise and settings, no adapter, no
    controls."""
    base_model: str | None = None
    """Folder or id of the base model. Give it when the model is not where the adapter says, or when there is no adapter:
    with --base, or with --classifier and --candidates or --method.name. 'shapes' ships with the package."""
    num_steps: Annotated[int | None, at_least(1)] = None
    """Denoising steps. None: as the adapter was trained."""
    eta: Annotated[float | None, at_least(0)] = None
    """DDIM stochasticity. None: as the adapter was trained."""
    guidance_scale: Annotated[float | None, at_least(1)] = None
    """Classifier-free guidance of the prompt (1 switches it off). None: as the adapter was trained."""
    control_scale: Annotated[float | None, at_least(0)] = None
    """A guidance scale for the label alone, as CFG fine-tuning has it. None: as the adapter was trained."""
    adapter_scale: float = 1.0
    """Scale of what the adapter adds. 1: as trained."""
    candidates: Annotated[int, at_least(1)] = 1
    """Draw this many candidates for each image and keep one, by its exact weight for the target. Sampling takes about twice
    this number times as long, and is exact in the limit. It needs --control and a classifier, and works with an adapter or
    with --base-model alone (no training)."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """Steer the pre-trained model of --base-model to --control with the classifiers, without adapter or training."""
    classifier: tuple[str, ...] = ()
    """NAME=FOLDER for each control: the classifier that weighs candidates or steers a method. Empty: the classifier that is
    stored with the adapter."""
    exponent: tuple[str, ...] = ()
    """NAME=NUMBER for each control: the target of candidates and methods is p_pre(x|c) p(y|x,c)^NUMBER. Empty:
    guidance_strength / kl_coef of the adapter, or 1 without an adapter."""
    device: str | None = None
    """torch device. None: a GPU if there is one."""
    precision: Precision | None = None
    """Precision of the denoiser. None: on a GPU as in the run that made the adapter, else fp32."""
    overwrite: bool = False
    """Replace the images of an earlier run in output_dir."""

    def __post_init__(self) -> None:
        check_fields(self)
        if bool(self.prompt) == bool(self.prompts_file):
            raise ConfigError(
                "expected either --prompt or --prompts-file; got " + ("both" if self.prompt else "neither")
            )
        steered = self.candidates > 1 or self.method.steers
        if self.adapter is None and not (self.base_model and (self.base or steered)):
            raise ConfigError(
                "no adapter is given; expected --adapter RUN/adapter, or --base --base-model MODEL for the pre-trained model, "
                "or --base-model MODEL --classifier NAME=FOLDER --control NAME=CLASS with --candidates 16 to choose among its "
                "images or --method.name dps to steer it"
            )
        if not steered and (self.classifier or self.exponent):
            option = "--classifier" if self.classifier else "--exponent"
            raise ConfigError(
                f"{option} weighs candidates or steers a method, but candidates is 1 and method.name plain; give --candidates "
                "8 or --method.name dps, or leave it out"
            )
        if self.method.steers and (self.adapter is not None or self.base or self.candidates > 1):
            other = "--adapter" if self.adapter is not None else "--base" if self.base else "--candidates"
            raise ConfigError(
                f"method {self.method.name} steers the pre-trained model by itself, but {other} is given too; leave one out"
            )
        if self.candidates > 1 and self.base and self.adapter is not None:
            raise ConfigError(
                f"--base asks for no control, so nothing chooses among {self.candidates} candidates; leave --candidates out, "
                "or give --adapter-scale 0 in place of --base to choose among the pre-trained model's images"
            )


def image_seed(seed: int, index: int) -> int:
    """Seed of image `index`: the first 63 bits of BLAKE2b-64 of the text "SEED/0/INDEX/sample" (see `draw_key`).

    `torch.Generator("cpu").manual_seed(image_seed(seed, index))` draws the image's noise: x_T first, then the steps'.
    """
    from ctrl_ray.diffusion.noise import draw_key

    return draw_key(seed, 0, index, "sample")


def sample(config: SampleConfig) -> Path:
    """Write `num_images` PNGs and `manifest.jsonl` into `output_dir`; returns the manifest's path.

    A manifest row is {"file", "prompt", "control": {name: label}, "seed"}, with candidates also {"candidates": K, "ess": the
    effective sample size of the image's group}, with a method {"method": {"name", its options that were given}}; with `base`
    nothing was asked, so its control is empty.

    Everything that was given is checked before a model is loaded, and nothing is written before the first images are there:
    ConfigError, DataError, ModelError, or RunFolderError when the folder holds images already. Later: NonFiniteError;
    ModelError for black images; InterruptedRunError, which says what is finished.
    """
    from tqdm.auto import tqdm

    from ctrl_ray.baselines.methods import latents_per_image
    from ctrl_ray.evaluation.sample_writer import SampleWriter
    from ctrl_ray.policy.adapter_info import read_adapter_info
    from ctrl_ray.policy.control.labels import parse_labels
    from ctrl_ray.runs.outputs import check_output

    if "://" in config.output_dir:
        raise ConfigError(f"output_dir is {config.output_dir!r}; expected a folder of this machine's file system")
    writer = SampleWriter(Path(check_output(config.output_dir)), overwrite=config.overwrite)
    info = None if config.adapter is None else read_adapter_info(config.adapter)
    labels = parse_labels(config.control, _controls(config, info))
    controls = {} if config.base and config.candidates == 1 else labels
    prompts = _prompts(config)
    generate = _generator(config, info, controls, prompts)
    try:
        with tqdm(total=config.num_images, unit="image") as progress:
            size = max(1, config.batch_size // latents_per_image(config.method))
            for start in range(0, config.num_images, size):
                indices = range(start, min(start + size, config.num_images))
                batch = [prompts[index % len(prompts)] for index in indices]
                seeds = [image_seed(config.seed, index) for index in indices]
                sampled = generate(batch, seeds)
                rows: list[dict[str, Any]] = [
                    {"file": f"{index:05d}.png", "prompt": prompt, "control": controls, "seed": seed}
                    for index, prompt, seed in zip(indices, batch, seeds, strict=True)
                ]
                if sampled.ess is not None:
                    for row, ess in zip(rows, sampled.ess, strict=True):
                        row |= {"candidates": config.candidates, "ess": round(float(ess), 4)}
                if config.method.steers:
                    for row in rows:
                        row |= {"method": {"name": config.method.name, **config.method.given}}
                writer.add(sampled.images, rows)
                progress.update(len(indices))
    except KeyboardInterrupt:
        raise InterruptedRunError(writer.interrupted(config.num_images)) from None
    writer.check()
    return writer.manifest


def _prompts(config: SampleConfig) -> tuple[str, ...]:
    from ctrl_ray.offline.prompts import read_prompts

    prompts = config.prompt or read_prompts(config.prompts_file or "", config.encoding)
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"prompt {prompt!r} is no text ({error.reason}); expected UTF-8") from error
    return prompts


Generate = Callable[[list[str], list[int]], "SampledImages"]
"""PIL images of prompts and as many seeds."""


def _controls(config: SampleConfig, info: AdapterInfo | None) -> Mapping[str, ControlConfig]:
    """What can be asked for: the adapter's controls, else those of the classifiers that choose among candidates."""
    from ctrl_ray.classifiers.classifier import read_control

    if info is not None:
        return info.controls
    if config.control and not config.classifier:
        raise ConfigError(
            f"the pre-trained model has no control {config.control[0]!r}; leave --control out, or choose among its images "
            "with --classifier NAME=FOLDER --candidates 16, or steer it with --method.name dps"
        )
    return {name: read_control(folder, name) for name, folder in _classifiers(config).items()}


def _classifiers(config: SampleConfig) -> dict[str, str]:
    return command.named_values("--classifier", config.classifier, command.CLASSIFIER_EXAMPLE)


def _generator(
    config: SampleConfig, info: AdapterInfo | None, controls: Mapping[str, int], prompts: Sequence[str]
) -> Generate:
    """Check what needs the base model's settings, then load the models."""
    from ctrl_ray.policy.adapter import adapter_backbone
    from ctrl_ray.policy.backbones import load_backbone
    from ctrl_ray.policy.prompt_lengths import cut_prompts

    device = _device(config)
    base = config.base_model or (embedded.NAME if info is None else info.base_model)
    revision = None if config.base_model or info is None else info.base_revision
    backbone = load_backbone(base) if info is None else adapter_backbone(info, config.base_model)
    sampler = _call(config).sampler(SamplerConfig() if info is None else info.sampler)
    if config.method.steers:
        config.method.sampler(sampler)  # whether a step is left to steer
    backbone.make_kernel(sampler, None if info is None else info.scheduler)
    for line in cut_prompts(backbone, set(prompts)):
        warnings.warn(line, UserWarning, stacklevel=2)
    if config.candidates > 1 or config.method.steers:
        _check_scoring(config, info, controls)
    without_adapter = config.base or info is None
    if without_adapter:
        pipeline = _base_pipeline(config, info, backbone, (base, revision), device)
    else:
        pipeline = _adapter_pipeline(config, device)
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], seeds: list[int]) -> SampledImages:
        with naming_memory(f"{len(prompts)} images at a time (--batch-size)"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*images are black")  # whoever writes them says so by their files' names
            return pipeline(
                prompts,
                controls=dict(controls),
                adapter_scale=1.0 if without_adapter else config.adapter_scale,
                generator=_generators(seeds),
                method=config.method,
                num_candidates=config.candidates,
                candidate_batch_size=config.batch_size,
                num_inference_steps=sampler.num_steps,
                eta=sampler.eta,
                guidance_scale=sampler.guidance_scale,
                control_scale=sampler.control_scale,
            )

    return generate


def _check_scoring(config: SampleConfig, info: AdapterInfo | None, controls: Mapping[str, int]) -> None:
    from ctrl_ray.candidates.scoring import CANDIDATES, CandidateScoring
    from ctrl_ray.policy.control.labels import label_rows
    from ctrl_ray.runs.finished import find_classifiers

    known = _controls(config, info)
    found = {} if config.adapter is None else find_classifiers(config.adapter, list(known), {})
    scoring = CandidateScoring(known, {**found, **_classifiers(config)}, command.exponents(config.exponent), info)
    scoring.check(label_rows(controls, known, 1), config.method.why if config.method.steers else CANDIDATES)


def _call(config: SampleConfig) -> CallConfig:
    return CallConfig(
        num_inference_steps=config.num_steps,
        eta=config.eta,
        guidance_scale=config.guidance_scale,
        control_scale=config.control_scale,
    )


def _adapter_pipeline(config: SampleConfig, device: str) -> ControlledPipeline:
    from ctrl_ray.pipeline import ControlledPipeline

    return ControlledPipeline.from_pretrained(
        config.adapter or "",
        base_model=config.base_model,
        device=device,
        precision=config.precision,
        classifiers=_classifiers(config),
        exponents=command.exponents(config.exponent),
    )


def _base_pipeline(
    config: SampleConfig, info: AdapterInfo | None, backbone: Backbone, base: tuple[str, str | None], device: str
) -> ControlledPipeline:
    from ctrl_ray.pipeline import ControlledPipeline
    from ctrl_ray.policy.adapter import check_base_model
    from ctrl_ray.policy.precision import sampling_precision

    if info is not None and (warning := check_base_model(info, backbone)):
        warnings.warn(warning, UserWarning, stacklevel=2)
    return ControlledPipeline.from_base_model(
        *base,
        scheduler=None if info is None else info.scheduler,
        device=device,
        precision=sampling_precision(config.precision, {} if info is None else info.training, device),
        classifiers=_classifiers(config),
        exponents=command.exponents(config.exponent),
    )


def _generators(seeds: list[int]) -> list[Any]:
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def _device(config: SampleConfig) -> str:
    import torch

    from ctrl_ray.policy.device import check_device

    return str(check_device(config.device or ("cuda" if torch.cuda.is_available() else "cpu")))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `ctrl_ray.command` says what the exit statuses mean."""
    return command.run(_main, argv)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Inside, a warning for users is its text, without a line of our code."""
    from tqdm.auto import tqdm

    with warnings.catch_warnings():
        show = warnings.showwarning

        def told(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if category is UserWarning:
                tqdm.write(f"warning: {message}", file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = told
        yield


def _main(argv: Sequence[str]) -> None:
    import tyro

    from ctrl_ray.candidates.trust import ess_lines

    config = tyro.cli(SampleConfig, args=argv, prog="python -m ctrl_ray.sample")
    with _plain_warnings():
        manifest = sample(config)
    for line in ess_lines(manifest):
        print(line)
    print(f"images and manifest: {manifest.parent}")


if __name__ == "__main__":
    sys.exit(main())
