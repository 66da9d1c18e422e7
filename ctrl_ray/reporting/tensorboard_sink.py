"""Writing one run as TensorBoard event files; the only module that imports tensorboardX."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image


class TensorBoardSink:
    """One run in a folder of event files (`tensorboard --logdir FOLDER`).

    Args:
        folder: Of this run alone.
        purge_after: A run that goes on: what was written of later updates no longer counts. None: a new one.
    """

    def __init__(self, folder: Path, *, purge_after: int | None) -> None:
        from tensorboardX import SummaryWriter

        purge_step = None if purge_after is None else purge_after + 1
        # a file is named by the second: a run that goes on within one would write over its own
        suffix = f".{time.time_ns()}"
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10, filename_suffix=suffix)

    def log_metrics(self, kind: str, update: int, metrics: Mapping[str, float]) -> None:
        """Each metric at step `update`, as KIND/NAME."""
        for name, value in metrics.items():
            self._writer.add_scalar(f"{kind}/{name}", value, update)

    def log_images(self, update: int, name: str, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Images at step `update`, and their captions as a text beside them."""
        for index, image in enumerate(images):
            self._writer.add_image(f"{name}/{index}", np.asarray(image.convert("RGB")), update, dataformats="HWC")
        text = "\n".join(f"{index}. {caption}" for index, caption in enumerate(captions) if caption)
        if text:
            self._writer.add_text(name, text, update)

    def close(self) -> None:
        """Write what is waiting."""
        self._writer.close()
