"""BRISQUE (Mittal, Moorthy and Bovik, IEEE TIP 2012): how unlike a natural image's the local statistics of an image are.

Luminance, less its local mean and over its local standard deviation (7x7 Gaussian, sd 7/6), has a bell-shaped histogram in
natural images; the products of neighbours have an asymmetric one. Fitting generalised Gaussians to both, at full and half size,
gives 36 features; a support-vector regression that people's ratings were fitted by makes a number of them: about 0 (natural)
to 100 (distorted).

The regression is the authors': the files `allmodel` and `allrange` of their release (BRISQUE_release.zip, Laboratory for Image
and Video Engineering, University of Texas at Austin), text in libsvm's formats. They are read from a folder and never fetched.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import correlate1d
from scipy.special import gamma

from ctrl_ray.errors import ModelError

MODEL, RANGES = "allmodel", "allrange"
NUM_FEATURES = 36
_SIDE, _SIGMA = 7, 7 / 6
_SHIFTS = ((0, 1), (1, 0), (1, 1), (-1, 1))
_FROM = "expected those of the authors' release of BRISQUE, text in libsvm's format"


@dataclass(frozen=True, eq=False)
class Brisque:
    """The score of images: an ε-support-vector regression with Gaussian kernels on scaled features.

    score(x) = Σ_i coefficient_i exp(−kernel_gamma ‖x − vector_i‖²) − rho
    """

    vectors: np.ndarray
    """(n, 36): support vectors."""
    coefficients: np.ndarray
    """(n,)."""
    kernel_gamma: float
    rho: float
    low: np.ndarray
    """(36,): a feature of this value is scaled to `scaled_to[0]`."""
    high: np.ndarray
    """(36,): the same for `scaled_to[1]`."""
    scaled_to: tuple[float, float] = (-1.0, 1.0)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Brisque:
        """The regression in a folder with `allmodel` and `allrange`; ModelError where they are missing or of another kind."""
        model, vectors, coefficients = _read_model(Path(folder) / MODEL)
        scaled_to, low, high = _read_ranges(Path(folder) / RANGES)
        return cls(vectors, coefficients, float(model["gamma"]), float(model["rho"]), low, high, scaled_to)

    def __call__(self, images: np.ndarray, prompts: Sequence[str] = ()) -> np.ndarray:
        """Scores (N,) float64 of images (N, H, W, 3) uint8; NaN for one that is flat, which has no statistics. Prompts play no
        part."""
        return np.array([self.score(brisque_features(image)) for image in images], dtype=np.float64)

    def score(self, features: np.ndarray) -> float:
        """Of the features (36,) of one image."""
        first, last = self.scaled_to
        scaled = first + (last - first) * (features - self.low) / (self.high - self.low)
        kernel = np.exp(-self.kernel_gamma * np.square(self.vectors - scaled).sum(axis=1))
        return float(self.coefficients @ kernel - self.rho)


def brisque_features(image: np.ndarray) -> np.ndarray:
    """The 36 features of an image (H, W, 3) uint8: 18 at full size, 18 at half. NaN where a scale is flat."""
    red, green, blue = np.moveaxis(image.astype(np.float64), -1, 0)
    luminance = np.round(0.298936 * red + 0.587043 * green + 0.114021 * blue)  # MATLAB's rgb2gray, 8-bit as there
    height, width = luminance.shape
    half = Image.fromarray(luminance.astype(np.float32)).resize(
        (-(-width // 2), -(-height // 2)), Image.Resampling.BICUBIC
    )
    return np.concatenate([_scale_features(each) for each in (luminance, np.asarray(half, dtype=np.float64))])


def normalised_luminance(luminance: np.ndarray) -> np.ndarray:
    """(I − μ) / (σ + 1), with local mean and standard deviation; outside the image is 0. (H, W) of 0 to 255 to the same."""
    mean = _blurred(luminance)
    std = np.sqrt(np.abs(_blurred(luminance**2) - mean**2))
    return (luminance - mean) / (std + 1)


def fitted_ggd(values: np.ndarray) -> tuple[float, float]:
    """(shape α, variance) of a generalised Gaussian of mean 0, by its moments: E[x²] / E[|x|]²."""
    shapes, ratio = _ratios()
    square, absolute = float(np.mean(values**2)), float(np.mean(np.abs(values)))
    if absolute == 0:
        return np.nan, np.nan
    return float(shapes[np.argmin(np.abs(ratio - square / absolute**2))]), square


def fitted_aggd(values: np.ndarray) -> tuple[float, float, float, float]:
    """(shape α, mean η, left and right variance) of an asymmetric generalised Gaussian, by its moments."""
    negative, positive = values[values < 0], values[values > 0]
    if not len(negative) or not len(positive):
        return np.nan, np.nan, np.nan, np.nan
    left, right = np.sqrt(np.mean(negative**2)), np.sqrt(np.mean(positive**2))
    skew = left / right
    moments = np.mean(np.abs(values)) ** 2 / np.mean(values**2)
    moments *= (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shapes, ratio = _ratios()
    shape = float(shapes[np.argmin(np.abs(1 / ratio - moments))])
    mean = (right - left) * gamma(2 / shape) / np.sqrt(gamma(1 / shape) * gamma(3 / shape))
    return shape, float(mean), float(left**2), float(right**2)


def _scale_features(luminance: np.ndarray) -> np.ndarray:
    normalised = normalised_luminance(luminance)
    features = list(fitted_ggd(normalised))
    for shift in _SHIFTS:
        features += fitted_aggd(normalised * np.roll(normalised, shift, axis=(0, 1)))
    return np.array(features)


def _blurred(image: np.ndarray) -> np.ndarray:
    offsets = np.arange(_SIDE) - _SIDE // 2
    window = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    window /= window.sum()
    across: np.ndarray = correlate1d(correlate1d(image, window, axis=0, mode="constant"), window, mode="constant")
    return across


@functools.cache
def _ratios() -> tuple[np.ndarray, np.ndarray]:
    """Shapes α from 0.2 to 10, and Γ(1/α) Γ(3/α) / Γ(2/α)² = E[x²] / E[|x|]² of each."""
    shapes = np.arange(200, 10_001) / 1000
    return shapes, gamma(1 / shapes) * gamma(3 / shapes) / gamma(2 / shapes) ** 2


def _lines(file: Path) -> list[list[str]]:
    try:
        return [line.split() for line in file.read_text(encoding="ascii").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(
            f"BRISQUE's {file.name} cannot be read from {file.parent} ({error}); expected a folder with {MODEL} and {RANGES} "
            "of the authors' release (evaluation.brisque_model), or leave it out"
        ) from error


def _read_model(file: Path) -> tuple[dict[str, str], np.ndarray, np.ndarray]:
    lines = _lines(file)
    start = next((index for index, line in enumerate(lines) if line == ["SV"]), len(lines))
    header = {line[0]: line[-1] for line in lines[:start]}
    kind = (header.get("svm_type"), header.get("kernel_type"))
    if kind != ("epsilon_svr", "rbf") or not {"gamma", "rho"} <= set(header) or start + 1 >= len(lines):
        raise ModelError(f"{file} is a model of the kind {kind} with {len(lines) - start - 1} support vectors; {_FROM}")
    vectors = np.zeros((len(lines) - start - 1, NUM_FEATURES))
    coefficients = np.zeros(len(vectors))
    try:
        for row, line in enumerate(lines[start + 1 :]):
            coefficients[row] = float(line[0])
            for entry in line[1:]:
                number, _, value = entry.partition(":")
                vectors[row, _column(number)] = float(value)
    except (ValueError, IndexError) as error:
        raise ModelError(f"{file}, support vector {row + 1}, cannot be read ({error}); {_FROM}") from error
    return header, vectors, coefficients


def _read_ranges(file: Path) -> tuple[tuple[float, float], np.ndarray, np.ndarray]:
    lines = _lines(file)
    low, high = np.full(NUM_FEATURES, np.nan), np.full(NUM_FEATURES, np.nan)
    try:
        scaled_to = (float(lines[1][0]), float(lines[1][1]))
        for number, *bounds in lines[2:]:
            low[_column(number)], high[_column(number)] = map(float, bounds)
    except (ValueError, IndexError) as error:
        raise ModelError(f"{file} cannot be read ({error}); {_FROM}") from error
    missing = [number + 1 for number in range(NUM_FEATURES) if not high[number] > low[number]]
    if lines[0] != ["x"] or missing:
        raise ModelError(f"{file} has no range for the features {missing}; {_FROM}")
    return scaled_to, low, high


def _column(number: str) -> int:
    """Of a feature's number, from 1 on; IndexError for any but 1 to 36."""
    column = int(number) - 1
    if not 0 <= column < NUM_FEATURES:
        raise IndexError(f"feature {number} of {NUM_FEATURES}")
    return column
