"""What a classifier is fitted on: images as the pipeline's VAE decodes them, with labels, in blocks on disk.

Decoding is done once, not every epoch. A block is a memory-mapped array and a JSON file, so that no process ever holds
the whole set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.embedded import is_embedded
from ctrl_ray.errors import ConfigError, DataError
from ctrl_ray.offline.images import cover_and_crop
from ctrl_ray.offline.reading import OnBadRow, iter_rows
from ctrl_ray.offline.shapes import draw_dataset
from ctrl_ray.offline.statistics import equal_share_thresholds
from ctrl_ray.oracles import is_told_prompt, load_oracle, measure
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.decoder import LatentDecoder, to_pixels, to_uint8
from ctrl_ray.runs.files import whole_file, write_whole

BLOCK_ROWS = 256
"""Rows of a block."""

SPLITS = ("fitting", "selection", "temperature")
"""Rows to minimise the loss on, to choose the epoch by, and to fit the temperature on."""

SamplePipeline = Callable[[int, int], Iterable[tuple[np.ndarray, Sequence[str]]]]
"""`sample_pipeline(num, seed)` yields batches of the pipeline's samples: images uint8 (B, H, W, 3) and B prompts."""


class Example(NamedTuple):
    """One row: an image as stored, its prompt, and its label (None where only an oracle can say)."""

    image: np.ndarray
    prompt: str
    label: int | None


class Row(NamedTuple):
    """One row of several controls, as `Example` is of one."""

    image: np.ndarray
    prompt: str
    labels: tuple[int | None, ...]


def read_examples(
    config: TrainConfig,
    control: str,
    image_size: tuple[int, int],
    *,
    on_bad_row: OnBadRow = "error",
    bad_rows_file: str | None = None,
) -> Iterator[Example]:
    """`read_rows` of one control."""
    for row in read_rows(config, [control], image_size, on_bad_row=on_bad_row, bad_rows_file=bad_rows_file):
        yield Example(row.image, row.prompt, row.labels[0])


def read_rows(
    config: TrainConfig,
    controls: Sequence[str],
    image_size: tuple[int, int],
    *,
    on_bad_row: OnBadRow = "error",
    bad_rows_file: str | None = None,
) -> Iterator[Row]:
    """The rows of `config.data` at image_size (height, width), in the order of the file; 'shapes' draws them. At most
    `config.classifier.max_images`.

    Prompts are "" where `config.classifier.ignore_prompts` is on. A control's column is read only where no oracle measures the
    label. Raises what `offline.reading.iter_rows` does.
    """
    for name in controls:
        require_prompts_for_oracle(config, name)
    if is_embedded(config.data):
        rows: Iterator[Row] = (
            Row(np.asarray(cover_and_crop(image, image_size)), prompt, (None,) * len(controls))
            for image, prompt in draw_dataset(config.num_drawn_images, config.seed)
        )
    else:
        rows = _parquet_rows(config, controls, image_size, on_bad_row, bad_rows_file)
    if config.classifier.ignore_prompts:
        rows = (row._replace(prompt="") for row in rows)
    return islice(rows, config.classifier.max_images)


def _parquet_rows(
    config: TrainConfig,
    controls: Sequence[str],
    image_size: tuple[int, int],
    on_bad_row: OnBadRow,
    bad_rows_file: str | None,
) -> Iterator[Row]:
    columns = {name: config.controls[name] for name in controls if not config.controls[name].oracle}
    for row in iter_rows(config.data or "", columns, on_bad_row, image_size=image_size, bad_rows_file=bad_rows_file):
        yield Row(row["image"], row["prompt"], tuple(row.get(name) for name in controls))


def require_prompts_for_oracle(config: TrainConfig, control: str) -> None:
    """ConfigError where an oracle is to be told the prompts that `classifier.ignore_prompts` leaves out."""
    oracle = config.controls[control].oracle
    if config.classifier.ignore_prompts and is_told_prompt(oracle):
        raise ConfigError(
            f"oracle {oracle!r} of control {control!r} judges an image with its prompt, and classifier.ignore_prompts leaves "
            "the prompts out; give one of the two"
        )


def label_images(
    config: TrainConfig, control: str, images: np.ndarray, prompts: Sequence[str], stored: Sequence[int | None]
) -> tuple[list[int], list[float]]:
    """(labels, measured numbers) of images uint8 (N, H, W, 3) and their N prompts: the control's oracle measures both, else the
    labels are those stored, and there are no numbers. DataError where there is neither."""
    spec = config.controls[control]
    if spec.oracle:
        values = measure(load_oracle(spec.oracle), images, prompts).tolist()
        return [spec.classify(value) for value in values], values
    labels = [label for label in stored if label is not None]
    if len(labels) < len(stored):
        raise DataError(
            f"control {control!r} has no oracle, and the images of {config.data!r} have no labels; name "
            "an oracle, or give a Parquet file with its column"
        )
    return labels, []


def image_digest(image: np.ndarray) -> str:
    """What two images share only where they are equal."""
    return hashlib.blake2b(image.tobytes(), digest_size=16).hexdigest()


def firsts(digests: Sequence[str]) -> np.ndarray:
    """For each row the first row that is equal to it, (num_rows,) int64."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(digest, row) for row, digest in enumerate(digests)], dtype=np.int64)


def split_of(num_rows: int, shares: Sequence[float], seed: int, *, salt: int = 0) -> np.ndarray:
    """Which of `SPLITS` each row belongs to, (num_rows,) int8: a hash of (seed, salt, row), the same for every run."""
    mask = (1 << 64) - 1
    key = np.uint64((seed * 0x9E3779B97F4A7C15 + (salt + 1) * 0xBF58476D1CE4E5B9) & mask)
    mixed = np.arange(1, num_rows + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    uniform = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53
    return np.searchsorted(np.cumsum(shares)[:2], uniform, side="right").astype(np.int8)


def encode_images(decoder: LatentDecoder, images: np.ndarray, device: torch.device | str) -> Tensor:
    """Latents (N, C, h, w) of images uint8 (N, H, W, 3)."""
    return decoder.encode(to_pixels(images, device))


class BlockWriter:
    """Decodes and labels rows, and writes the blocks that one worker is responsible for."""

    def __init__(self, config: TrainConfig, control: str, folder: Path, device: torch.device) -> None:
        self.config, self.control, self.folder = config, control, folder
        self.device = device
        self.decoder: LatentDecoder | None = None
        if config.classifier.decode:
            chunk = config.rewards.fixed_decode_chunk_size
            backbone = load_backbone(config.base_model, config.base_revision, config.sampler)
            self.decoder = backbone.load_decoder(chunk, device)

    def write_data(
        self, rows: Iterable[Example], rank: int, num_workers: int, told: Callable[[int], None] = lambda rows: None
    ) -> int:
        """Write the blocks rank, rank + num_workers, ... of `rows`; returns how many rows there are in all. told: is called
        with the number of rows so far after each block."""
        total, block, iterator = 0, 0, iter(rows)
        while chunk := list(islice(iterator, BLOCK_ROWS)):
            if block % num_workers == rank and not _exists(self.folder, "data", block):
                images = np.stack([row.image for row in chunk])
                self._write("data", block, images, [row.prompt for row in chunk], [row.label for row in chunk])
            total, block = total + len(chunk), block + 1
            told(total)
        return total

    def write_samples(self, sample_pipeline: SamplePipeline, num: int, rank: int, num_workers: int) -> None:
        """Write the blocks rank, rank + num_workers, ... of `num` samples of the pipeline."""
        for block in range(rank, -(-num // BLOCK_ROWS), num_workers):
            if _exists(self.folder, "samples", block):
                continue
            wanted = min(BLOCK_ROWS, num - block * BLOCK_ROWS)
            seed = int(np.random.SeedSequence([self.config.seed, 1, block]).generate_state(1)[0])
            batches = list(sample_pipeline(wanted, seed))
            images = np.concatenate([np.asarray(images) for images, _ in batches])[:wanted]
            prompts = [prompt for _, some in batches for prompt in some][:wanted]
            if len(images) < wanted:
                raise DataError(f"sample_pipeline gave {len(images)} samples where {wanted} were asked for")
            self._write("samples", block, images, prompts, [None] * wanted, decode=False)

    def _write(
        self,
        kind: str,
        block: int,
        images: np.ndarray,
        prompts: list[str],
        labels: list[int | None],
        decode: bool = True,
    ) -> None:
        digests = [image_digest(image) for image in images]
        if self.decoder is not None and decode:
            images = self._decoded(images)
        known, values = label_images(self.config, self.control, images, prompts, labels)
        rows = {"prompts": prompts, "labels": known, "values": values, "digests": digests}
        _save(self.folder, kind, block, images, rows)

    def _decoded(self, images: np.ndarray) -> np.ndarray:
        assert self.decoder is not None
        with torch.no_grad():
            return to_uint8(self.decoder.decode(encode_images(self.decoder, images, self.device))).cpu().numpy()


class Examples:
    """The blocks of a folder as one sequence: the rows of the data, then the pipeline's samples."""

    def __init__(self, folder: Path, num_data: int, num_samples: int, shares: Sequence[float], seed: int) -> None:
        self.arrays: list[np.ndarray] = []
        self.prompts: list[str] = []
        digests: list[str] = []
        labels: list[int] = []
        values: list[float] = []
        for kind, num in (("data", num_data), ("samples", num_samples)):
            for block in range(-(-num // BLOCK_ROWS)):
                array, rows = _load(folder, kind, block)
                self.arrays.append(array)
                self.prompts += rows["prompts"]
                labels += rows["labels"]
                digests += rows["digests"]
                values += rows["values"]
        self.values = np.array(values)
        """What the oracle measured of each row; empty where none did."""
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.num_different = len(set(digests))
        self.starts = np.cumsum([0] + [len(array) for array in self.arrays])
        self.is_sample = np.arange(len(labels)) >= num_data
        split = np.concatenate([split_of(num_data, shares, seed), split_of(num_samples, shares, seed, salt=1)])
        split = split[firsts(digests)]  # equal images on the same side: else the held-out rows would be known already
        self.rows = {name: np.flatnonzero(split == index) for index, name in enumerate(SPLITS)}

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def span(self) -> tuple[float, float] | None:
        """The smallest and the largest of the measured numbers; None where there are none."""
        return (float(self.values.min()), float(self.values.max())) if len(self.values) else None

    def with_equal_shares(self, spec: ControlConfig, num_classes: int) -> ControlConfig:
        """Label the rows anew by thresholds that give `num_classes` classes equal shares of the pipeline's samples, which the
        reward will judge, or where there are none of the data; returns the control with them. DataError where so many of the
        numbers are equal that there are no such thresholds."""
        values = self.values[self.is_sample] if self.is_sample.any() else self.values
        thresholds = equal_share_thresholds(values, num_classes)
        if not thresholds:
            raise DataError(
                f"all {len(values)} numbers that {spec.oracle!r} measures are {values[0]:g}: there is nothing to control; give "
                "other images or another oracle"
            )
        if len(thresholds) + 1 < num_classes:
            raise DataError(
                f"{len(values)} numbers that {spec.oracle!r} measures, {len(np.unique(values))} of them different, cannot be "
                f"split into {num_classes} classes of equal share; give --equal-classes {len(thresholds) + 1}, or thresholds"
            )
        self.labels = torch.from_numpy(np.searchsorted(thresholds, self.values, side="right"))
        return replace(spec, thresholds=thresholds)

    def batch(self, rows: np.ndarray) -> tuple[Tensor, list[str], Tensor]:
        """Images (B, 3, H, W) float32 in [0, 1], prompts, and labels (B,) of these rows."""
        blocks = np.searchsorted(self.starts, rows, side="right") - 1
        images = np.stack([self.arrays[b][row - self.starts[b]] for b, row in zip(blocks, rows, strict=True)])
        return to_pixels(images), [self.prompts[row] for row in rows], self.labels[rows]


def _paths(folder: Path, kind: str, block: int) -> tuple[Path, Path]:
    return folder / f"{kind}-{block:06d}.npy", folder / f"{kind}-{block:06d}.json"


def _exists(folder: Path, kind: str, block: int) -> bool:
    return _paths(folder, kind, block)[1].is_file()


def _save(folder: Path, kind: str, block: int, images: np.ndarray, rows: dict[str, Any]) -> None:
    array_path, rows_path = _paths(folder, kind, block)
    with whole_file(array_path) as draft, draft.open("wb") as stream:
        np.save(stream, images, allow_pickle=False)
    write_whole(rows_path, json.dumps(rows))  # last: its presence says that the block is there


def _load(folder: Path, kind: str, block: int) -> tuple[np.ndarray, dict[str, Any]]:
    array_path, rows_path = _paths(folder, kind, block)
    if not rows_path.is_file():
        raise DataError(
            f"block {rows_path} is missing on this node; with classifier.num_workers > 1 on several nodes the output "
            "folder must be on storage that all of them share"
        )
    return np.load(array_path, mmap_mode="r", allow_pickle=False), json.loads(rows_path.read_text(encoding="utf-8"))
