"""Files that are there as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; at the end of the block what was written takes the place of `path`.

    Readers see the old file or the new one, and a process that is killed leaves no half of one. After an error in the
    block nothing has changed.
    """
    draft = path.with_name(f"{path.name}.draft")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """`path.write_text` as a whole (`whole_file`), in UTF-8."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")
