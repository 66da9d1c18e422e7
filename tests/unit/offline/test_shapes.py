"""The drawn example: keyed by index, ruled by detail and colourfulness, and by the prompt in nothing but the shape."""

import numpy as np
import pytest

from ctrl_ray.offline.shapes import COLOURS, PROMPTS, SHAPES, draw, draw_dataset, parse_prompt
from ctrl_ray.oracles import colourfulness, jpeg_size


def rank_correlation(first, second):
    """Spearman's, without ties."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (first, second)]
    return np.corrcoef(*ranks)[0, 1]


def test_prompts_are_all_pairs_of_a_colour_and_a_shape():
    assert len(PROMPTS) == len(set(PROMPTS)) == 24
    assert {parse_prompt(prompt) for prompt in PROMPTS} == {(colour, shape) for colour in COLOURS for shape in SHAPES}


@pytest.mark.parametrize("prompt", ["a pink circle", "red circle", "a red circle on grass", ""])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="a COLOUR SHAPE"):
        parse_prompt(prompt)


@pytest.mark.parametrize(("detail", "colour"), [(-0.1, 0.5), (1.1, 0.5), (0.5, 2.0), (float("nan"), 0.5)])
def test_levels_outside_the_unit_interval_are_refused(detail, colour):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
        draw(PROMPTS[0], detail, colour, np.random.default_rng(0))


def test_size_must_be_whole_cells():
    with pytest.raises(ValueError, match="multiple of 8, got 60"):
        draw(PROMPTS[0], 0.5, 0.5, np.random.default_rng(0), size=60)


def test_image_i_does_not_depend_on_how_many_are_drawn():
    few, many = list(draw_dataset(5, seed=3)), list(draw_dataset(12, seed=3))
    for (image, prompt), (same_image, same_prompt) in zip(few, many):
        assert prompt == same_prompt
        assert image.tobytes() == same_image.tobytes()
    assert len({image.tobytes() for image, _ in many}) == 12
    other = [image.tobytes() for image, _ in draw_dataset(5, seed=4)]
    assert all(image.tobytes() != theirs for (image, _), theirs in zip(few, other))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_shape_has_its_colour_and_covers_a_tenth_of_the_image(prompt):
    colour, _ = parse_prompt(prompt)
    for seed in range(5):
        pixels = np.asarray(draw(prompt, 0.0, 0.0, np.random.default_rng(seed)))
        covered = (pixels == np.uint8(COLOURS[colour])).all(axis=-1).mean()
        assert 0.06 < covered < 0.36  # the smallest cross is 25 px across, the largest square 34 px


def test_shapes_are_anti_aliased():
    pixels = np.asarray(draw("a white circle", 0.0, 0.0, np.random.default_rng(0)))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10  # ground, outline and fill alone would be three


def test_jpeg_size_rises_with_detail():
    rng = np.random.default_rng(0)
    details = rng.uniform(size=300)
    sizes = [jpeg_size(draw(PROMPTS[i % 24], float(d), 0.5, rng)) for i, d in enumerate(details)]
    assert rank_correlation(details, sizes) > 0.85
    assert np.percentile(sizes, 75) > 1.3 * np.percentile(sizes, 25)


def test_colourfulness_rises_with_its_level():
    rng = np.random.default_rng(0)
    levels = rng.uniform(size=300)
    measured = [colourfulness(draw("a white circle", 0.5, float(level), rng)) for level in levels]
    assert rank_correlation(levels, measured) > 0.85


@pytest.mark.full
def test_jpeg_class_is_spread_within_every_prompt():
    drawn = [(jpeg_size(image), prompt) for image, prompt in draw_dataset(2400, seed=0)]
    thresholds = np.percentile([size for size, _ in drawn], [25, 50, 75])
    for prompt in PROMPTS:
        classes = np.searchsorted(thresholds, [size for size, theirs in drawn if theirs == prompt])
        share = np.bincount(classes, minlength=4) / len(classes)
        # Independence would give 0.25; with about 100 images of a prompt its standard deviation is 0.043. A shape
        # itself costs some bytes, a triangle more than a square, so the shares are not quite equal.
        assert share.min() > 0.08, (prompt, share)
        assert share.max() < 0.45, (prompt, share)


@pytest.mark.full
def test_detail_and_colourfulness_are_drawn_independently_of_the_prompt_and_of_each_other():
    drawn = list(draw_dataset(1200, seed=0))
    ground = np.stack([np.asarray(image)[0] for image, _ in drawn]).astype(float)  # the top row: nearly always ground
    busy = ground.std(axis=(1, 2))
    for index in range(2):
        names = list(COLOURS) if index == 0 else list(SHAPES)
        means = [np.mean([b for b, (_, p) in zip(busy, drawn) if parse_prompt(p)[index] == name]) for name in names]
        # about 200 images each: the mean's standard error is busy.std() / 14
        assert np.ptp(means) < 6 * busy.std() / 14
