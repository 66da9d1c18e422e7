"""Read a folder that `python -m ctrl_ray.sample` wrote: what can be judged from PNGs alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import DataError
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.offline.text import lines_of, read_text

MANIFEST = "manifest.jsonl"


def read_sample_folder(folder: str | Path, controls: Mapping[str, ControlConfig]) -> EvaluationSamples:
    """The samples that `manifest.jsonl` lists: rows {"file", "prompt", "control": {name: class}, "seed"}.

    A control that a row does not name has the null label. `sample_ids` are the row numbers; `kl` is NaN, because images
    do not hold their trajectory.

    Raises:
        DataError: No manifest, a row without its keys, a control or class that `controls` does not have, a file that is
            missing, outside the folder or no image, or images of different sizes. It names the row.
    """
    root = Path(folder)
    manifest = root / MANIFEST
    if not manifest.is_file():
        raise DataError(f"{manifest} does not exist; expected a folder written by python -m ctrl_ray.sample")
    prompts, labels, images = [], [], []
    for number, line in enumerate(lines_of(read_text(manifest)), start=1):
        if not line.strip():
            continue
        where = f"{manifest} line {number}"
        row = _row(line, where)
        prompts.append(str(row["prompt"]))
        labels.append(_labels(row.get("control") or {}, controls, where))
        images.append(_image(root, str(row["file"]), where))
        if images[-1].shape != images[0].shape:
            raise DataError(
                f"{where}: {row['file']} is {images[-1].shape[1]}x{images[-1].shape[0]} pixels, the first image is "
                f"{images[0].shape[1]}x{images[0].shape[0]}; expected one size"
            )
    if not images:
        raise DataError(f"{manifest} lists no image; expected one JSON row for each")
    return EvaluationSamples(
        images=np.stack(images),
        prompts=tuple(prompts),
        labels=np.array(labels, dtype=np.int64).reshape(len(images), len(controls)),
        kl=np.full(len(images), np.nan),
        sample_ids=np.arange(len(images), dtype=np.int64),
    )


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}") from error
    missing = [key for key in ("file", "prompt") if not isinstance(row, dict) or key not in row]
    if missing:
        raise DataError(f'{where} lacks {missing}; expected {{"file", "prompt", "control": {{name: class}}, "seed"}}')
    return row


def _labels(asked: Any, controls: Mapping[str, ControlConfig], where: str) -> list[int]:
    unknown = sorted(set(asked) - set(controls)) if isinstance(asked, dict) else [asked]
    if unknown:
        raise DataError(f"{where}: unknown control {unknown}; the adapter has {list(controls)}")
    labels = []
    for name, control in controls.items():
        value = asked.get(name)
        if isinstance(value, str) and value in control.class_names:
            value = control.class_names.index(value)
        if value is None:
            value = control.num_classes
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= control.num_classes:
            raise DataError(
                f"{where}: class {value!r} of control {name!r} does not exist; expected 0..{control.num_classes - 1} or "
                f"one of {list(control.class_names)}"
            )
        labels.append(value)
    return labels


def _image(root: Path, file: str, where: str) -> np.ndarray:
    path = (root / file).resolve()
    if not path.is_relative_to(root.resolve()):
        raise DataError(f"{where}: file {file!r} lies outside {root}; expected a path inside the folder")
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{where}: {file} cannot be read as an image ({error})") from error
