"""Writing samples: whole batches, what is finished, and what is never replaced unasked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ctrl_ray.errors import ModelError, RunFolderError
from ctrl_ray.evaluation.sample_writer import SampleWriter


def _image(value: int) -> Image.Image:
    return Image.fromarray(np.full((2, 2, 3), value, np.uint8))


def _add(writer: SampleWriter, first: int, *values: int) -> None:
    rows: list[dict[str, Any]] = [
        {"file": f"{first + index:05d}.png", "prompt": "a cat", "control": {}, "seed": index}
        for index in range(len(values))
    ]
    writer.add([_image(value) for value in values], rows)


def test_images_and_rows(tmp_path: Path) -> None:
    writer = SampleWriter(tmp_path / "new" / "samples", overwrite=False)
    assert not (tmp_path / "new").exists()
    _add(writer, 0, 10, 20)
    _add(writer, 2, 30)
    rows = [json.loads(line) for line in writer.manifest.read_text().splitlines()]
    assert [row["file"] for row in rows] == ["00000.png", "00001.png", "00002.png"] and writer.finished == 3
    assert [int(np.asarray(Image.open(writer.folder / row["file"])).max()) for row in rows] == [10, 20, 30]
    writer.check()


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    """Samples of another run, or pictures that have our names. Asked to, only what a manifest lists is taken away."""
    _add(SampleWriter(tmp_path, overwrite=False), 0, 10, 20, 30)
    with pytest.raises(RunFolderError, match=r"already holds manifest\.jsonl; give another folder, or --overwrite"):
        SampleWriter(tmp_path, overwrite=False)
    _image(40).save(tmp_path / "20240131.png")
    _add(SampleWriter(tmp_path, overwrite=True), 0, 50)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["00000.png", "20240131.png", "manifest.jsonl"]
    assert np.asarray(Image.open(tmp_path / "00000.png")).max() == 50
    (tmp_path / "manifest.jsonl").unlink()
    with pytest.raises(RunFolderError, match=r"already holds 00000\.png"):
        SampleWriter(tmp_path, overwrite=False)


def test_two_runs_at_once_do_not_mix(tmp_path: Path) -> None:
    first, second = (SampleWriter(tmp_path / "samples", overwrite=False) for _ in range(2))
    _add(first, 0, 10)
    with pytest.raises(RunFolderError, match=r"already holds manifest\.jsonl"):
        _add(second, 0, 20)
    _add(first, 1, 30)
    assert len(first.manifest.read_text().splitlines()) == 2
    assert np.asarray(Image.open(tmp_path / "samples" / "00000.png")).max() == 10


def test_black_images(tmp_path: Path) -> None:
    """A batch of them alone is not written; others are, and are told of at the end."""
    writer = SampleWriter(tmp_path / "samples", overwrite=False)
    with pytest.raises(
        ModelError, match=r"2 of 2 images are black, .*: 00000\.png, 00001\.png\. .* They are not written$"
    ):
        _add(writer, 0, 0, 0)
    assert not (tmp_path / "samples").exists()
    _add(writer, 0, 0, 10)
    with pytest.raises(ModelError, match=r"00002\.png\. .* not written; 2 images are finished, in "):
        _add(writer, 2, 0)
    with pytest.raises(ModelError, match=rf"1 of 2 images are black, .*: 00000\.png\. .*; all are in {tmp_path}"):
        writer.check()


def test_what_is_finished_when_it_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = SampleWriter(tmp_path / "samples", overwrite=False)
    assert writer.interrupted(9) == "stopped; no image is finished, and nothing was written"
    _add(writer, 0, 10, 20)
    assert writer.interrupted(9).startswith(f"stopped; 2 of 9 images are finished, with their manifest in {tmp_path}")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(
        RunFolderError, match=r"cannot be written \(No space left on device\); 2 images are finished, in"
    ):
        _add(writer, 2, 30)
    assert len(writer.manifest.read_text().splitlines()) == 2
