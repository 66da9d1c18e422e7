"""The drawn example: "a red circle" on woven ground, from flat to busy and from grey to colourful.

The prompt says what the shape is. The ground is drawn independently of it, so that what the ground decides, the size
of the JPEG file and the colourfulness, is a control which the prompt does not have yet.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (35, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 40),
    "purple": (145, 45, 180),
    "white": (250, 250, 250),
}
"""Name of a shape's colour to its RGB value."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
"""Names of the shapes."""

PROMPTS: tuple[str, ...] = tuple(f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""The 24 prompts, colour by colour."""

CELL = 8
"""Side in pixels of a cell of the weave. It is that of a JPEG block and of a latent pixel, so a small VAE carries it."""

_OVERSAMPLING = 4
_OUTLINE = 1.5
_OUTLINE_COLOUR = (20, 20, 20)


def parse_prompt(prompt: str) -> tuple[str, str]:
    """Split `"a red circle"` into `("red", "circle")`.

    Raises:
        ValueError: `prompt` is none of `PROMPTS`.
    """
    if prompt not in PROMPTS:
        raise ValueError(f'prompt must be "a COLOUR SHAPE", one of ctrl_ray.offline.shapes.PROMPTS, got {prompt!r}')
    _, colour, shape = prompt.split(" ")
    return colour, shape


def draw(prompt: str, detail: float, colourfulness: float, rng: np.random.Generator, size: int = 64) -> Image.Image:
    """Draw one image of a prompt.

    Args:
        prompt: One of `PROMPTS`.
        detail: Strength of the ground's weave, 0 (flat) to 1. The JPEG size rises with it.
        colourfulness: Saturation of the ground and its threads, 0 (grey) to 1.
        rng: Source of everything else: hue, brightness, where the shape is and how large.
        size: Side of the image in pixels, a multiple of `CELL`.

    Returns:
        An RGB image, `size` by `size`.
    """
    colour, shape = parse_prompt(prompt)
    for name, value in (("detail", detail), ("colourfulness", colourfulness)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if size % CELL:
        raise ValueError(f"size must be a multiple of {CELL}, got {size}")
    ground = _draw_ground(detail, colourfulness, rng, size)
    outer, inner = _shape_masks(shape, rng, size)
    image = np.asarray(ground, dtype=np.float32)
    image = image + outer[..., None] * (np.asarray(_OUTLINE_COLOUR, np.float32) - image)
    image = image + inner[..., None] * (np.asarray(COLOURS[colour], np.float32) - image)
    return Image.fromarray(np.rint(image).astype(np.uint8))


def draw_dataset(num_images: int, seed: int, size: int = 64) -> Iterator[tuple[Image.Image, str]]:
    """Draw `num_images` pairs of an image and its prompt.

    Prompt, detail and colourfulness are uniform and independent. Each image is keyed by `(seed, index)`: image i is
    the same however many are drawn.
    """
    for index in range(num_images):
        rng = np.random.default_rng((seed, index))
        prompt = PROMPTS[int(rng.integers(len(PROMPTS)))]
        yield draw(prompt, float(rng.uniform()), float(rng.uniform()), rng, size), prompt


def _rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), dtype=np.float32) * 255.0


def _draw_ground(detail: float, colourfulness: float, rng: np.random.Generator, size: int) -> Image.Image:
    """A flat ground with the same weave, a light and a dark thread, in every cell; `detail` sets their contrast.

    One number of the whole image decides how strong the weave is and another how saturated, so the denoiser settles
    both early, from all cells at once, and a policy can steer them where a step's noise is large and a push cheap.
    """
    saturation = 0.8 * colourfulness
    hue = float(rng.uniform())
    flat = _rgb(hue, saturation, float(rng.uniform(0.4, 0.6)))
    light, dark = _rgb(hue + 0.08, saturation, 0.95), _rgb(hue - 0.08, saturation, 0.08)
    contrast = detail**1.5  # the JPEG size is concave in the contrast: this spreads it evenly
    cell = np.empty((CELL, CELL, 3), dtype=np.float32)
    cell[:] = flat
    cell[1:5, 1:4] += contrast * (light - flat)
    cell[4:7, 4:7] += contrast * (dark - flat)
    return Image.fromarray(np.rint(np.tile(cell, (size // CELL, size // CELL, 1))).astype(np.uint8))


def _shape_masks(shape: str, rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage in [0, 1] of a shape with its outline and without, each (size, size), anti-aliased."""
    diameter = float(rng.uniform(0.4, 0.6)) * size
    margin = diameter / 2 + 2
    x, y = (float(centre) for centre in rng.uniform(margin, size - margin, size=2))
    return _mask(shape, x, y, diameter / 2 + _OUTLINE, size), _mask(shape, x, y, diameter / 2, size)


def _mask(shape: str, x: float, y: float, radius: float, size: int) -> np.ndarray:
    mask = Image.new("L", (size * _OVERSAMPLING, size * _OVERSAMPLING), 0)
    canvas = ImageDraw.Draw(mask)

    def scaled(*points: tuple[float, float]) -> list[tuple[float, float]]:
        return [((x + dx) * _OVERSAMPLING, (y + dy) * _OVERSAMPLING) for dx, dy in points]

    if shape == "circle":
        canvas.ellipse(scaled((-radius, -radius), (radius, radius)), fill=255)
    elif shape == "square":
        side = 0.88 * radius
        canvas.rectangle(scaled((-side, -side), (side, side)), fill=255)
    elif shape == "triangle":
        canvas.polygon(scaled((0.0, -radius), (radius, 0.85 * radius), (-radius, 0.85 * radius)), fill=255)
    else:
        arm = 0.36 * radius
        canvas.rectangle(scaled((-arm, -radius), (arm, radius)), fill=255)
        canvas.rectangle(scaled((-radius, -arm), (radius, arm)), fill=255)
    small = mask.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255.0
