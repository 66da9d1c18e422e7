"""`python -m ctrl_ray.sample --adapter RUN/adapter --prompt "a red circle" --control jpeg_size=2 --output-dir OUT`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrl_ray import command, embedded
from ctrl_ray.config import Precision, SamplerConfig
from ctrl_ray.errors import ConfigError, RunFolderError

if TYPE_CHECKING:
    from ctrl_ray.policy.adapter import AdapterInfo

MANIFEST = "manifest.jsonl"
_OWN_FILE = re.compile(r"\d{5,}\.png")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Sample images with an adapter or, with --base, from its pre-trained model with the same noise."""

    adapter: str | None = None
    """Adapter folder, such as RUN/adapter. Its sampler settings are used, unless a flag below changes them."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    prompts_file: str | None = None
    """Text file with one prompt per line, instead of --prompt."""
    control: tuple[str, ...] = ()
    """NAME=CLASS for each control, such as jpeg_size=2. CLASS is an index or a name. Controls that you do not name
    get the null label."""
    num_images: int = 16
    """Images in total. The prompts take turns."""
    seed: int = 0
    """The seed of image i is made from this seed and i. It does not depend on batch_size or num_images."""
    output_dir: str = "samples"
    """Folder of the PNGs and of their manifest.jsonl."""
    batch_size: int = 32
    """Images sampled at a time. It limits the memory."""
    base: bool = False
    """Sample from the pre-trained model, for pictures before and after: same noise and settings, no adapter, no
    controls."""
    base_model: str | None = None
    """Folder or id of the base model. Give it when the model is not where the adapter remembers it, or with --base
    and no adapter. 'shapes' ships with the package."""
    num_steps: int | None = None
    """Denoising steps. None: as the adapter was trained."""
    eta: float | None = None
    """DDIM stochasticity. None: as the adapter was trained."""
    guidance_scale: float | None = None
    """Classifier-free guidance of the prompt (1 switches it off). None: as the adapter was trained."""
    adapter_scale: float = 1.0
    """Scale of LoRA and control embeddings. 1: as trained."""
    device: str | None = None
    """torch device. None: a GPU if there is one."""
    precision: Precision | None = None
    """Precision of the denoiser. None: on a GPU that of the run that made the adapter, else fp32."""
    overwrite: bool = False
    """Replace the images of an earlier run in output_dir."""

    def __post_init__(self) -> None:
        for name in ("num_images", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if bool(self.prompt) == bool(self.prompts_file):
            raise ConfigError(
                "expected either --prompt or --prompts-file; got " + ("both" if self.prompt else "neither")
            )
        if self.adapter is None and not (self.base and self.base_model):
            raise ConfigError(
                "no adapter is given; expected --adapter RUN/adapter, or --base --base-model MODEL for the pre-trained model"
            )


def image_seed(seed: int, index: int) -> int:
    """Seed of image `index`: the first 63 bits of BLAKE2b-64 of the text "SEED/0/INDEX/sample" (see `draw_key`).

    `torch.Generator("cpu").manual_seed(image_seed(seed, index))` draws the image's noise: x_T first, then the steps'.
    """
    from ctrl_ray.diffusion.noise import draw_key

    return draw_key(seed, 0, index, "sample")


def parse_controls(arguments: Sequence[str], info: AdapterInfo) -> dict[str, int]:
    """Labels by control of 'NAME=CLASS' arguments; ConfigError for what the adapter does not have."""
    from ctrl_ray.policy.control.labels import class_index

    labels: dict[str, int] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals or name in labels:
            raise ConfigError(f"control {argument!r} is not NAME=CLASS, once for each control; example: jpeg_size=2")
        if name not in info.controls:
            raise ConfigError(f"unknown control {name!r}; this adapter has {list(info.controls)}")
        labels[name] = class_index(name, info.controls[name], value)
    return labels


def sample(config: SampleConfig) -> Path:
    """Write `num_images` PNGs and `manifest.jsonl` into `output_dir`; returns the manifest's path.

    A manifest row is {"file", "prompt", "control": {name: label}, "seed"}; with `base` nothing was asked, so its
    control is empty. Raises ConfigError, ModelError, or RunFolderError when the folder holds a manifest already.
    """
    from tqdm.auto import tqdm

    from ctrl_ray.offline.prompts import read_prompts
    from ctrl_ray.policy.adapter import read_adapter_info

    info = None if config.adapter is None else read_adapter_info(config.adapter)
    labels = {} if info is None else parse_controls(config.control, info)
    if info is None and config.control:
        raise ConfigError(f"the pre-trained model has no control {config.control[0]!r}; leave --control out")
    controls = {} if config.base else labels
    prompts = config.prompt or read_prompts(config.prompts_file or "")
    folder = Path(config.output_dir)
    _check_folder(folder, config.overwrite)
    generate = _base_generator(config, info) if config.base else _adapter_generator(config, controls)
    manifest = _prepare_folder(folder)
    with manifest.open("w", encoding="utf-8") as rows, tqdm(total=config.num_images, unit="image") as progress:
        for start in range(0, config.num_images, config.batch_size):
            indices = range(start, min(start + config.batch_size, config.num_images))
            batch = [prompts[index % len(prompts)] for index in indices]
            seeds = [image_seed(config.seed, index) for index in indices]
            for index, image, prompt, seed in zip(indices, generate(batch, seeds), batch, seeds, strict=True):
                file = f"{index:05d}.png"
                image.save(folder / file)
                row = {"file": file, "prompt": prompt, "control": controls, "seed": seed}
                rows.write(json.dumps(row, ensure_ascii=False) + "\n")
            rows.flush()
            progress.update(len(indices))
    return manifest


Generate = Callable[[list[str], list[int]], list[Any]]
"""PIL images of prompts and as many seeds."""


def _adapter_generator(config: SampleConfig, controls: Mapping[str, int]) -> Generate:
    from ctrl_ray.pipeline import ControlledPipeline

    pipeline = ControlledPipeline.from_pretrained(
        config.adapter or "", base_model=config.base_model, device=_device(config), precision=config.precision
    )
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], seeds: list[int]) -> list[Any]:
        return pipeline(
            prompts,
            controls=dict(controls),
            num_inference_steps=config.num_steps,
            eta=config.eta,
            guidance_scale=config.guidance_scale,
            adapter_scale=config.adapter_scale,
            generator=_generators(seeds),
        ).images

    return generate


def _base_generator(config: SampleConfig, info: AdapterInfo | None) -> Generate:
    from ctrl_ray.pipeline import ControlledPipeline
    from ctrl_ray.policy.adapter import check_base_model
    from ctrl_ray.policy.backbones import load_backbone
    from ctrl_ray.policy.precision import sampling_precision

    sampler = SamplerConfig() if info is None else info.sampler
    base = config.base_model or (embedded.NAME if info is None else info.base_model)
    revision = None if config.base_model or info is None else info.base_revision
    if info is not None:
        check_base_model(info, load_backbone(base, revision))
    device = _device(config)
    pipeline = ControlledPipeline.from_base_model(
        base,
        revision,
        scheduler=None if info is None else info.scheduler,
        device=device,
        precision=sampling_precision(config.precision, {} if info is None else info.training, device),
    )
    pipeline.set_progress_bar_config(disable=True)

    def generate(prompts: list[str], seeds: list[int]) -> list[Any]:
        return pipeline(
            prompts,
            num_inference_steps=sampler.num_steps if config.num_steps is None else config.num_steps,
            eta=sampler.eta if config.eta is None else config.eta,
            guidance_scale=sampler.guidance_scale if config.guidance_scale is None else config.guidance_scale,
            generator=_generators(seeds),
        ).images

    return generate


def _generators(seeds: list[int]) -> list[Any]:
    import torch

    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def _device(config: SampleConfig) -> str:
    import torch

    return config.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _check_folder(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"output_dir {folder} is a file; expected a folder")
    if (folder / MANIFEST).exists() and not overwrite:
        raise RunFolderError(
            f"output_dir {folder} already holds {MANIFEST}; give another folder, or --overwrite to replace its images"
        )


def _prepare_folder(folder: Path) -> Path:
    """Make the folder and take away the images of the run that is replaced; returns the manifest's path."""
    folder.mkdir(parents=True, exist_ok=True)
    manifest = folder / MANIFEST
    if manifest.exists():
        manifest.unlink()
        for file in folder.iterdir():
            if _OWN_FILE.fullmatch(file.name):
                file.unlink()
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; `ctrl_ray.command` says what the exit statuses mean."""
    return command.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    import tyro

    manifest = sample(tyro.cli(SampleConfig, args=argv, prog="python -m ctrl_ray.sample"))
    print(f"images and manifest: {manifest.parent}")


if __name__ == "__main__":
    sys.exit(main())
