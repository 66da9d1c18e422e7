"""A file is there as a whole or as it was before."""

from __future__ import annotations

from pathlib import Path

import pytest

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
