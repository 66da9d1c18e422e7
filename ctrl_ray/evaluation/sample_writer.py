"""Write a folder of samples: PNGs and their manifest, one batch at a time."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ctrl_ray.errors import ModelError, RunFolderError
from ctrl_ray.evaluation.sample_folder import MANIFEST
from ctrl_ray.offline.text import json_line
from ctrl_ray.policy.outputs import black_rows, black_text

_OWN_FILE = re.compile(r"\d{5,}\.png")
_FILE_OF_ROW = re.compile(r'^\{"file": "(\d{5,}\.png)"')


class SampleWriter:
    """The images of one run of `python -m ctrl_ray.sample`; nothing is written or replaced before the first ones are there.

    Raises RunFolderError for a folder that holds samples, or pictures of the names that would be written, unless `overwrite`.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        self.folder, self.manifest = folder, folder / MANIFEST
        self.finished = 0
        """Images that are written, with their rows."""
        self._black: list[str] = []
        self._overwrite = overwrite
        if overwrite or not folder.is_dir():
            return
        taken = [MANIFEST] if self.manifest.exists() else [file.name for file in self._own_files()][:1]
        if taken:
            raise RunFolderError(self._taken(taken[0]))

    def add(self, images: Sequence[Image.Image], rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a batch: the image of each row under the row's "file", then the rows.

        ModelError when all of them are black, and nothing is written of them; RunFolderError when a file cannot be written.
        """
        black = [str(rows[row]["file"]) for row in black_rows(np.stack([np.asarray(image) for image in images]))]
        if len(black) == len(rows):
            raise ModelError(f"{black_text(black, len(rows))}. They are not written{self._so_far()}")
        self._black += black
        try:
            if self.finished == 0:
                self._begin()
            with self.manifest.open("a", encoding="utf-8") as lines:
                for image, row in zip(images, rows, strict=True):
                    image.save(self.folder / row["file"])
                    lines.write(json_line(row))
                    lines.flush()
                    self.finished += 1
        except RunFolderError:
            raise
        except OSError as error:
            raise RunFolderError(
                f"{self.folder} cannot be written ({error.strerror or error}){self._so_far()}; make room there, or give "
                "another --output-dir"
            ) from error

    def check(self) -> None:
        """ModelError that names the images that are black, if any are."""
        if self._black:
            raise ModelError(f"{black_text(self._black, self.finished)}; all are in {self.folder}")

    def interrupted(self, total: int) -> str:
        """What to say when the command is stopped."""
        if self.finished == 0:
            return "stopped; no image is finished, and nothing was written"
        return (
            f"stopped; {self.finished} of {total} images are finished, with their manifest in {self.folder}. An image depends "
            "on the seed and its number alone: the same command with --overwrite draws them again, and the rest"
        )

    def _so_far(self) -> str:
        return f"; {self.finished} images are finished, in {self.folder}" if self.finished else ""

    def _begin(self) -> None:
        """Make the folder, and take away the images of the run that is replaced: those that its manifest lists."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._overwrite:
            try:
                self.manifest.open("x").close()
            except FileExistsError:  # since the look at the start
                raise RunFolderError(self._taken(MANIFEST)) from None
            return
        lines = (
            self.manifest.read_text(encoding="utf-8", errors="replace").split("\n") if self.manifest.exists() else []
        )
        listed = {str(name) for line in lines for name in _FILE_OF_ROW.findall(line)}
        for file in self._own_files():
            if file.name in listed:
                file.unlink()
        self.manifest.unlink(missing_ok=True)

    def _taken(self, name: str) -> str:
        return (
            f"output_dir {self.folder} already holds {name}; give another folder, or --overwrite to replace its images"
        )

    def _own_files(self) -> list[Path]:
        return sorted(file for file in self.folder.iterdir() if _OWN_FILE.fullmatch(file.name))
