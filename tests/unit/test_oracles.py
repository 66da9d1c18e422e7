"""The oracles against values worked out by hand, and what they refuse."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctrl_ray import oracles
from ctrl_ray.errors import ConfigError, DataError


def noise(seed: int = 0, size: tuple[int, int] = (24, 40)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_jpeg_size_is_the_length_of_the_file_that_pillow_writes(tmp_path: Path) -> None:
    image = Image.fromarray(noise())
    image.save(tmp_path / "image.jpg", quality=95)
    assert oracles.jpeg_size(image) == (tmp_path / "image.jpg").stat().st_size


def test_jpeg_size_depends_on_the_pixels_only() -> None:
    plain = Image.fromarray(noise())
    described = plain.copy()
    described.info = {"comment": b"x" * 500, "icc_profile": b"y" * 500}
    assert oracles.jpeg_size(described) == oracles.jpeg_size(plain)
    assert described.info["comment"] == b"x" * 500, "the caller's image must stay as it is"


def test_colourfulness_of_two_halves_by_hand() -> None:
    # Left half red (255, 0, 0): rg = 255, yb = 127.5. Right half blue (0, 0, 255): rg = 0, yb = -255.
    pixels = np.zeros((2, 4, 3), dtype=np.uint8)
    pixels[:, :2, 0] = 255
    pixels[:, 2:, 2] = 255
    std = math.sqrt(127.5**2 + 191.25**2)
    mean = math.sqrt(127.5**2 + 63.75**2)
    assert oracles.colourfulness(Image.fromarray(pixels)) == pytest.approx(std + 0.3 * mean, rel=1e-12)


def test_colourfulness_of_grey_is_zero() -> None:
    grey = np.repeat(noise()[..., :1], 3, axis=-1)
    assert oracles.colourfulness(Image.fromarray(grey)) == 0.0


def test_to_rgb_lays_transparency_over_white() -> None:
    pixels = np.zeros((1, 2, 4), dtype=np.uint8)
    pixels[0, 0] = (10, 20, 30, 0)
    pixels[0, 1] = (10, 20, 30, 255)
    rgb = np.asarray(oracles.to_rgb(Image.fromarray(pixels)))
    assert rgb.tolist() == [[[255, 255, 255], [10, 20, 30]]]


def test_to_rgb_of_a_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 0
    assert np.asarray(oracles.to_rgb(image)).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_to_rgb_applies_the_exif_orientation() -> None:
    image = Image.fromarray(noise(size=(4, 6)))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    buffer = io.BytesIO()
    image.save(buffer, "PNG", exif=exif)
    turned = np.asarray(oracles.to_rgb(Image.open(buffer)))
    assert np.array_equal(turned, np.rot90(noise(size=(4, 6)), k=-1))


def test_to_rgb_of_16_bit_grey_keeps_the_upper_bits() -> None:
    image = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert np.asarray(oracles.to_rgb(image))[0, :, 0].tolist() == [0, 1, 255]


def test_load_oracle_finds_a_function_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ray_oracle_a.py").write_text("def width(image):\n    return image.width\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # restores sys.path afterwards
    oracle = oracles.load_oracle("ray_oracle_a:width")
    assert oracle(Image.new("RGB", (7, 3))) == 7
    assert oracles.control_name("ray_oracle_a:width") == "width"
    with pytest.raises(ConfigError, match=r"no function 'widht'.*'width'"):
        oracles.load_oracle("ray_oracle_a:widht")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("jpegsize", r"'jpegsize' is unknown; expected one of \['colourfulness', 'jpeg_size'\].*mean 'jpeg_size'"),
        ("no_such_module_x:f", r"module 'no_such_module_x' does not import \(ModuleNotFoundError.*PYTHONPATH"),
        ("math:", "'math:' is unknown"),
        ("sharp.py:sharpness", r"names a file; expected its module: sharp:sharpness, with sharp\.py in the working"),
        ("oracles/sharp.py:f", r"expected its module: sharp:f"),
        ("math:pi", r"has no function 'pi'"),
    ],
)
def test_load_oracle_says_what_is_wrong(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        oracles.load_oracle(name)


def test_an_oracle_may_draw_on_its_image() -> None:
    image = Image.fromarray(noise())

    def draws(given: Image.Image) -> float:
        given.paste((255, 0, 0), (0, 0, 20, 20))
        return 1.0

    before = oracles.jpeg_size(image)
    assert (oracles.measure_one(draws, image), oracles.jpeg_size(image)) == (1.0, before)


def test_measure_gives_one_number_per_image() -> None:
    images = np.stack([noise(seed) for seed in range(3)])
    values = oracles.measure(lambda image: np.float32(np.asarray(image)[0, 0, 0]), images)
    assert values.dtype == np.float64
    assert values.tolist() == [float(image[0, 0, 0]) for image in images]


@pytest.mark.parametrize(("returned", "shown"), [(math.nan, "nan"), (None, "None"), ("12", "'12'"), (True, "True")])
def test_measure_refuses_what_is_not_a_finite_number(returned: object, shown: str) -> None:
    images = np.stack([noise(0), noise(1)])

    def second_fails(image: Image.Image) -> object:
        return returned if np.array_equal(np.asarray(image), images[1]) else 1.0

    with pytest.raises(DataError, match=rf"image 1 of 2: oracle 'second_fails' returned {shown}; expected a finite"):
        oracles.measure(second_fails, images)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit])
def test_measure_names_an_oracle_that_raises(error: type[BaseException]) -> None:
    def broken(image: Image.Image) -> float:
        raise error("no area")

    with pytest.raises(DataError, match=rf"image 0 of 1: oracle 'broken' failed \({error.__name__}: no area\)"):
        oracles.measure(broken, noise()[None])


def test_measure_refuses_floats() -> None:
    with pytest.raises(DataError, match="float64 of shape"):
        oracles.measure(oracles.jpeg_size, np.zeros((1, 4, 4, 3)))


def test_an_oracle_with_a_parameter_prompt_is_told_it() -> None:
    """A default is the oracle's own affair: such a one was an oracle before, and stays what it is."""
    images = np.stack([noise(seed) for seed in range(3)])

    def by_prompt(image: Image.Image, prompt: str) -> float:
        return len(prompt) + image.width / 1000

    def with_default(image: Image.Image, prompt: str = "a cat") -> float:
        return len(prompt)

    assert [oracles.needs_prompt(each) for each in (by_prompt, with_default, oracles.jpeg_size)] == [True, False, False]
    assert not oracles.needs_prompt(max), "a function that does not say its parameters"
    width = images.shape[2] / 1000
    assert oracles.measure(by_prompt, images, ["", "ab", "abcd"]).tolist() == [width, 2 + width, 4 + width]
    assert oracles.measure(with_default, images, ["", "ab", "abcd"]).tolist() == [5.0, 5.0, 5.0]
    with pytest.raises(
        DataError, match=r"image 0 of 3: oracle 'by_prompt' judges an image with its prompt.*has no prompt"
    ):
        oracles.measure(by_prompt, images)
