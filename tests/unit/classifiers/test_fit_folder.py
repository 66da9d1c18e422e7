"""What a fit makes in its folder, and what is left of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctrl_ray.driver.classifier import _scratch


def test_a_fit_cleans_up_after_itself_and_after_killed_ones(tmp_path: Path) -> None:
    """Decoded images are large; what else is there stays."""
    (tmp_path / ".fit-killed" / "examples").mkdir(parents=True)
    (tmp_path / ".fit-killed" / "examples" / "0").write_text("x")
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(KeyboardInterrupt), _scratch(tmp_path) as scratch:
        assert (scratch / "examples").is_dir() and scratch.parent == tmp_path
        assert sorted(path.name for path in tmp_path.iterdir()) == [scratch.name, "mine.txt"]
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
