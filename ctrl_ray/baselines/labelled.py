"""The labelled images of stage 1 as latents: what baselines are trained on that see noised latents in place of images.

They are the same rows, labels and splits that `python -m ctrl_ray.classify` fits on, so that methods compare on one budget.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ctrl_ray.classifiers.examples import (
    BLOCK_ROWS,
    SPLITS,
    Row,
    encode_images,
    firsts,
    image_digest,
    label_images,
    read_rows,
    split_of,
)
from ctrl_ray.classifiers.soundness import check_classes, class_rows
from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.errors import ConfigError, DataError
from ctrl_ray.offline.reading import OnBadRow
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.decoder import LatentDecoder, to_uint8

_TELL_EVERY_S = 15.0


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledLatents:
    """N labelled images as a base model's VAE encodes them."""

    latents: Tensor
    """(N, C, h, w) float32, clean, on the CPU."""
    prompts: tuple[str, ...]
    """N; "" where the data set has no prompts."""
    labels: Tensor
    """(N, number of controls) int64, a column for each of `controls`."""
    split: Tensor
    """(N,) int8: index in `classifiers.examples.SPLITS` of the part that stage 1 puts the image into."""
    controls: Mapping[str, ControlConfig]
    """By name, in the order of the columns."""

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def num_classes(self) -> dict[str, int]:
        """Of each control, in the order of the columns."""
        return {name: spec.num_classes for name, spec in self.controls.items()}

    def rows(self, split: str) -> Tensor:
        """Numbers of the images of 'fitting', 'selection' or 'temperature', ascending."""
        return (self.split == SPLITS.index(split)).nonzero()[:, 0]


class _Block(NamedTuple):
    latents: Tensor
    prompts: list[str]
    labels: Tensor
    digests: list[str]
    spans: list[tuple[float, float] | None]


def read_labelled(
    config: TrainConfig,
    controls: Sequence[str] | None = None,
    *,
    device: torch.device | str = "cpu",
    on_bad_row: OnBadRow = "error",
    bad_rows_file: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> LabelledLatents:
    """The first `classifier.max_images` images of `config.data` ('shapes': they are drawn), encoded once, with their labels.

    An oracle measures the decoded latents where `classifier.decode` is on, as in stage 1, else the image as it is stored.
    All latents are in memory: N · C · h · w · 4 bytes.

    Args:
        config: `base_model`, `data`, `seed`, `controls` and `classifier` (max_images, split, decode) are used.
        controls: Names of those whose labels are wanted, in the order of the columns. None: all of the config.
        device: Where the VAE runs.
        on_bad_row: 'error', or 'skip' to set bad rows of the data set aside, in `bad_rows_file` (None: beside it).
        say: Gets a line of progress every 15 seconds.

    Raises:
        ConfigError: A control that the config does not have, or no data.
        DataError: The data set cannot be read, has no labels of a control, or rows of one class only.
        ModelError: The base model cannot be read.
    """
    names = list(config.controls) if controls is None else list(controls)
    _check(config, names)
    backbone = load_backbone(config.base_model, config.base_revision, config.sampler)
    decoder = backbone.load_decoder(config.rewards.fixed_decode_chunk_size, device)
    rows = read_rows(config, names, backbone.image_size(), on_bad_row=on_bad_row, bad_rows_file=bad_rows_file)
    blocks: list[_Block] = []
    total, told = 0, time.monotonic()
    while chunk := list(islice(rows, BLOCK_ROWS)):
        blocks.append(_read_block(config, names, decoder, device, chunk))
        total += len(chunk)
        if time.monotonic() - told >= _TELL_EVERY_S:
            say(f"{total} images encoded and labelled")
            told = time.monotonic()
    if not blocks:
        raise DataError(f"{config.data!r} has no rows; expected labelled images")
    labels = torch.cat([block.labels for block in blocks])
    for column, name in enumerate(names):
        spec = config.controls[name]
        spans = [span for block in blocks if (span := block.spans[column]) is not None]
        span = (min(low for low, _ in spans), max(high for _, high in spans)) if spans else None
        check_classes(name, spec, class_rows(labels[:, column], spec.num_classes), "images", span)
    digests = [digest for block in blocks for digest in block.digests]
    split = split_of(total, config.classifier.split, config.seed)[firsts(digests)]
    return LabelledLatents(
        latents=torch.cat([block.latents for block in blocks]),
        prompts=tuple(prompt for block in blocks for prompt in block.prompts),
        labels=labels,
        split=torch.from_numpy(split),
        controls={name: config.controls[name] for name in names},
    )


def _check(config: TrainConfig, names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in config.controls]
    if unknown or not names:
        raise ConfigError(
            f"labels of controls {list(names)} are wanted, but the config has {sorted(config.controls)}; name at least one "
            "of them"
        )
    if config.data is None:
        raise ConfigError("there is no data set to read labelled images from; give --data")


def _read_block(
    config: TrainConfig, names: Sequence[str], decoder: LatentDecoder, device: torch.device | str, rows: Sequence[Row]
) -> _Block:
    images = np.stack([row.image for row in rows])
    latents = encode_images(decoder, images, device)
    judged = images
    if config.classifier.decode and any(config.controls[name].oracle for name in names):
        with torch.no_grad():
            judged = to_uint8(decoder.decode(latents)).cpu().numpy()
    prompts = [row.prompt for row in rows]
    columns, spans = [], []
    for column, name in enumerate(names):
        labels, values = label_images(config, name, judged, prompts, [row.labels[column] for row in rows])
        columns.append(torch.tensor(labels, dtype=torch.int64))
        spans.append((min(values), max(values)) if values else None)
    return _Block(
        latents.float().cpu(),
        prompts,
        torch.stack(columns, dim=1),
        [image_digest(image) for image in images],
        spans,
    )
