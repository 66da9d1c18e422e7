"""A file is there as a whole or as it was before."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctrl_ray.runs.copies import FolderCopy
from ctrl_ray.runs.files import whole_file, write_whole


def test_a_file_changes_at_the_end_and_not_after_an_error(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    write_whole(file, "ä")
    assert file.read_bytes() == "ä".encode()
    with whole_file(file) as draft:
        draft.write_text("new")
        assert file.read_text(encoding="utf-8") == "ä", "readers see the old file until the end"
    assert file.read_text() == "new"
    with pytest.raises(KeyboardInterrupt), whole_file(file) as draft:
        draft.write_text("half of")
        raise KeyboardInterrupt
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_an_adapter_travels_without_the_classifiers_of_its_users(tmp_path: Path) -> None:
    for name in ("adapter.json", "unet/weights", "classifier/size/model"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert set(FolderCopy.read(tmp_path).files) == {"adapter.json", "unet/weights"}
    assert set(FolderCopy.read(tmp_path / "classifier").files) == {"size/model"}
