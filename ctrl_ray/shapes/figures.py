"""What `ctrl_ray.shapes.make` writes about its stages: `training.json`, and `training.png` among the pictures."""

from __future__ import annotations

import json
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image
from torch import Tensor

from ctrl_ray.oracles import UNITS

matplotlib.use("Agg")
from matplotlib import pyplot


def to_pil(images: Tensor) -> list[Image.Image]:
    """Images in [0, 1] as 8-bit pictures."""
    pixels = (images * 255.0).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(each) for each in pixels]


def plot(output_dir: Path, file: Path, pictures: list[Image.Image], measured: dict[str, np.ndarray]) -> None:
    """Draw the loss of each stage (from `output_dir`), samples, and how the two controls are spread over them."""
    figures_of = json.loads((output_dir / "training.json").read_text())
    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8))
    for axis, name in zip(axes[0], ("vae", "unet", "recogniser"), strict=True):
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
