"""Labels of the drawn example that depend on a word of the prompt which no image shows.

`ctrl_ray.offline.shapes` draws what a prompt says, so a rule by colour or shape could be read off the image, and y would not
depend on the prompt given the image. Here the last word, 'strict' or 'mild', is drawn beside the finished image: p(c|x) is ½
for either. The built-in pipeline was never trained on these words and draws the same images with and without them.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from ctrl_ray.offline.shapes import draw_dataset
from ctrl_ray.oracles import jpeg_size

SHIFTS = {"strict": 400.0, "mild": -400.0}
"""Bytes by which a prompt's last word moves the thresholds."""


def jpeg_size_by_prompt(image: Image.Image, prompt: str) -> float:
    """An oracle: the JPEG size less the shift, so that fixed thresholds are those of the prompt."""
    return jpeg_size(image) - SHIFTS[prompt.rpartition(" ")[2]]


def draw_with_rules(num_images: int, seed: int) -> Iterator[tuple[Image.Image, str]]:
    """`draw_dataset`, each prompt with 'strict' or 'mild' at its end, whatever the image."""
    words = np.random.default_rng((seed, 1)).choice(list(SHIFTS), num_images)
    for (image, prompt), word in zip(draw_dataset(num_images, seed), words, strict=True):
        yield image, f"{prompt} {word}"
