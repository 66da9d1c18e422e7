"""Which files of a folder are images, and what is said of the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ctrl_ray.errors import DataError
from ctrl_ray.offline.folder import HIDDEN, NOWHERE, REPEATED, ImageFiles, find_images


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def names(found: ImageFiles) -> list[str]:
    return [os.path.relpath(file, found.root) for file in found.files]


def test_cameras_and_phones_name_files_as_they_like(tmp_path: Path) -> None:
    touch(
        tmp_path, "_DSC1.JPG", "_best/IMG_2.jpeg", "web.jfif", "scan.TIFF", "two words.png", "Grün 好.png", "a#b$c.webp"
    )
    found = find_images(tmp_path)
    assert names(found) == sorted(
        ["_DSC1.JPG", "_best/IMG_2.jpeg", "web.jfif", "scan.TIFF", "two words.png", "Grün 好.png", "a#b$c.webp"]
    )
    assert found.describe_left_out() == ""


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "a.txt", "labels.csv", "b.jxl", "raw/c.CR2", "raw/d.cr2", "README", "Thumbs.db")
    touch(tmp_path, "._a.png", ".thumbnails/a.png", "__MACOSX/x.png")
    found = find_images(tmp_path, beside={".txt", str(tmp_path / "labels.csv")})
    assert names(found) == ["a.png"]
    assert found.left_out == {".cr2": 2, ".jxl": 1, "without an ending": 1, HIDDEN: 4}
    assert found.describe_left_out() == (
        "left out 8 files that are no images to read: 2 .cr2, 1 .jxl (to read them: pip install pillow-jxl-plugin), "
        f"4 {HIDDEN}, 1 without an ending"
    )


def test_many_endings_are_not_all_listed(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", *(f"{letter}.{letter}x" for letter in "abcdefg"))
    assert "and" not in (line := find_images(tmp_path).describe_left_out()) and "2 with other endings" in line


def test_links_are_followed_once(tmp_path: Path) -> None:
    touch(tmp_path, "photos/z/a.png", "elsewhere/b.png")
    photos = tmp_path / "photos"
    (photos / "z" / "all").symlink_to(photos)
    (photos / "again").symlink_to(photos / "z")
    (photos / "a_link.png").symlink_to(photos / "z" / "a.png")
    (photos / "other").symlink_to(tmp_path / "elsewhere")
    (photos / "lost").symlink_to(tmp_path / "nowhere")
    found = find_images(photos)
    assert names(found) == ["other/b.png", "z/a.png"], "its own path rather than a link's"
    assert found.left_out == {REPEATED: 3, NOWHERE: 1}


def test_a_name_that_is_no_utf8_is_a_bad_row(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.png", "wb"):
        pass
    found = find_images(tmp_path)
    assert names(found) == ["a.png"]
    assert str(found.bad_rows[0]).startswith(f"{tmp_path}/caf\\xe9.png, row 0")
    assert "not UTF-8; rename it" in found.bad_rows[0].reason
    with pytest.raises(DataError, match=r"caf\\xe9' holds bytes that are not UTF-8; rename"):
        find_images(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))


def test_one_file_is_a_folder_of_one(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "b.png")
    found = find_images(tmp_path / "a.png")
    assert (found.files, found.root) == ([str(tmp_path / "a.png")], str(tmp_path))


def test_no_image_is_an_error_that_says_what_there_is(tmp_path: Path) -> None:
    touch(tmp_path, "IMG_1.HEIC", "IMG_2.HEIC") if ".heic" not in _read() else touch(tmp_path, "a.cr2", "b.cr2")
    with pytest.raises(DataError, match=r"is an empty set: it holds no image \(left out 2 files .*2 \.(heic|cr2)"):
        find_images(tmp_path)
    with pytest.raises(DataError, match="a path is empty; expected"):
        find_images("")
    with pytest.raises(DataError, match=r"x{300} cannot be looked at \(.*too long|x{300} cannot be looked at \(.*stat"):
        find_images(tmp_path / ("x" * 300))
    with pytest.raises(DataError, match="missing does not exist; expected a folder of images"):
        find_images(tmp_path / "missing")


def _read() -> tuple[str, ...]:
    from ctrl_ray.offline.images import suffixes

    return suffixes()
