"""What `ctrl_ray.shapes.make` writes about its stages: `training.json`, and a picture of each pipeline among the pictures."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ctrl_ray.evaluation.recogniser import Recogniser
from ctrl_ray.offline.shapes import PROMPTS
from ctrl_ray.oracles import ORACLES, UNITS

matplotlib.use("Agg")
from matplotlib import pyplot


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images in [0, 1] as 8-bit pictures."""
    pixels = (images * 255.0).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each) for each in pixels]


@torch.no_grad()
def sample(pipeline: Any, num_images: int, seed: int, call: Mapping[str, Any]) -> tuple[Tensor, list[str]]:
    """Images (N, 3, 64, 64) in [0, 1] of random prompts, and the prompts. call: what a call of the pipeline is given."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    prompts = [PROMPTS[index] for index in torch.randint(len(PROMPTS), (num_images,), generator=generator).tolist()]
    chunks = [
        pipeline(prompts[i : i + 64], generator=generator, output_type="pt", height=64, width=64, **call).images
        for i in range(0, num_images, 64)
    ]
    return torch.cat(chunks).float(), prompts


def prompt_accuracy(images: Tensor, prompts: list[str], args: argparse.Namespace) -> float:
    """How many show what their prompts say."""
    right = Recogniser.from_pretrained(args.output_dir / "recogniser").is_right(images, prompts)
    return right.float().mean().item()


def figures_of_samples(
    pipeline: Any, call: Mapping[str, Any], args: argparse.Namespace, denoiser: str, picture: str
) -> dict[str, Any]:
    """How often a pipeline obeys its prompts and how its controls are spread; and the picture of it (`plot`)."""
    images, prompts = sample(pipeline, args.num_samples, args.seed, call)
    pictures = to_pil(images)
    figures: dict[str, Any] = {
        "num_samples": args.num_samples,
        "prompt_accuracy": prompt_accuracy(images, prompts, args),
    }
    measured = {name: np.array([oracle(picture) for picture in pictures]) for name, oracle in ORACLES.items()}
    for name, values in measured.items():
        figures[name] = {f"p{rank:02d}": round(float(np.percentile(values, rank)), 2) for rank in (5, 25, 50, 75, 95)}
    by_prompt = {
        prompt: measured["jpeg_size"][[theirs == prompt for theirs in prompts]] for prompt in sorted(set(prompts))
    }
    figures["jpeg_size_quartiles_of_each_prompt"] = {
        prompt: [round(float(value)) for value in np.percentile(sizes, (25, 50, 75))]
        for prompt, sizes in by_prompt.items()
    }
    plot(args.output_dir, args.pictures_dir / picture, pictures, measured, denoiser)
    return figures


def plot(
    output_dir: Path, file: Path, pictures: list[Image.Image], measured: dict[str, np.ndarray], denoiser: str = "unet"
) -> None:
    """Draw the loss of each stage (from `output_dir`), samples, and how the two controls are spread over them. denoiser: the
    stage that trained it."""
    figures_of = json.loads((output_dir / "training.json").read_text())
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8))
    for axis, name in zip(axes[0], ("vae", denoiser, "recogniser"), strict=True):
        axis.plot(*zip(*figures_of.get(name, {}).get("curve", [[1, 1.0]]), strict=True))
        axis.set(title=f"{name}: training loss", xlabel="update", yscale="log")
    columns, rows = 12, 8
    grid = Image.new("RGB", (64 * columns, 64 * rows))
    for index, picture in enumerate(pictures[: columns * rows]):
        grid.paste(picture, (64 * (index % columns), 64 * (index // columns)))
    axes[1, 0].imshow(grid)
    axes[1, 0].set_axis_off()
    axes[1, 0].set_title("samples of the pipeline")
    for axis, (name, values) in zip(axes[1, 1:], measured.items(), strict=False):
        axis.hist(values, bins=50)
        for threshold in np.percentile(values, (25, 50, 75)):
            axis.axvline(threshold, color="black", linewidth=1)
        axis.set(title=f"{name} of samples, with quartiles", xlabel=UNITS[name])
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=70)
    pyplot.close(figure)


def record(output_dir: Path, name: str, figures: dict[str, Any]) -> None:
    """Put the figures of one stage into `training.json`, next to those of the others."""
    path = output_dir / "training.json"
    figures_of = json.loads(path.read_text()) if path.exists() else {}
    figures_of[name] = figures
    versions = ("torch", "diffusers", "transformers", "numpy", "pillow")
    figures_of["versions"] = {package: metadata.version(package) for package in versions}
    path.write_text(compact_rows(json.dumps(figures_of, indent=1)) + "\n")
    print(name, {key: value for key, value in figures.items() if key != "curve"}, flush=True)


def compact_rows(text: str) -> str:
    """Indented JSON with each list of numbers on one line."""
    return re.sub(
        r"\[[\s\d.,e+-]+\]", lambda match: re.sub(r"\s+", " ", match[0]).replace("[ ", "[").replace(" ]", "]"), text
    )
