"""Which files of a folder are images, and what is left out of it, counted by reason."""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pyarrow import fs

from ctrl_ray.errors import DataError
from ctrl_ray.offline.images import PLUGINS, suffixes
from ctrl_ray.offline.schema import SKIP_HINT, BadRow
from ctrl_ray.offline.storage import is_text, look_at, printable

HIDDEN, REPEATED, NOWHERE = "hidden or of the system", "there already by another path", "links to nothing"

_SYSTEM = frozenset({"thumbs.db", "desktop.ini", "__macosx", "@eadir", "$recycle.bin"})
"""Files and folders that systems put beside pictures, in lower case; names that begin with a dot are left out anyway."""
_COMMON = (".png", ".jpg", ".webp", ".tif")
_MOST_SUFFIXES = 5


@dataclass
class ImageFiles:
    """The images below a folder."""

    filesystem: fs.FileSystem
    root: str
    """The names that tables use are relative to it."""
    files: list[str] = field(default_factory=list)
    """Paths on the file system, sorted."""
    bad_rows: list[BadRow] = field(default_factory=list)
    """Images whose names, and folders whose content, cannot be read."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Number of other files by reason, which is an ending such as '.cr2' or a text."""

    def describe_left_out(self) -> str:
        """One line for a person, "" when nothing is left out."""
        if not self.left_out:
            return ""
        reasons = self.left_out.most_common()
        endings = [(reason, count) for reason, count in reasons if reason.startswith(".")]
        shown = [f"{count} {reason}{_plugin(reason)}" for reason, count in endings[:_MOST_SUFFIXES]]
        if len(endings) > _MOST_SUFFIXES:
            shown.append(f"{sum(count for _, count in endings[_MOST_SUFFIXES:])} with other endings")
        shown += [f"{count} {reason}" for reason, count in reasons if not reason.startswith(".")]
        return f"left out {self.left_out.total()} files that are no images to read: {', '.join(shown)}"


def find_images(path: str | Path, *, beside: Container[str] = ()) -> ImageFiles:
    """The image file `path`, or all images below the folder `path`, of any file system that pyarrow.fs opens.

    Links are followed; a folder or file that is reached twice counts once, by its own path rather than a link's.

    beside: files that belong to the images, by their path or their ending ('.txt'): they are not counted as left out.
    Raises DataError when there is no image, with what there is instead.
    """
    filesystem, location, there = look_at(path)
    found = ImageFiles(filesystem, location.rstrip("/") or "/")
    expected = f"expected a folder of images ({', '.join(_COMMON)}, and others that Pillow opens)"
    if there == fs.FileType.NotFound:
        raise DataError(f"{path} does not exist; {expected}; check the path")
    if there == fs.FileType.File:
        found.files, found.root = [location], os.path.dirname(location)
        return found
    if isinstance(filesystem, fs.LocalFileSystem):
        _walk(found, beside)
    else:
        for entry in filesystem.get_file_info(fs.FileSelector(location, recursive=True)):
            if entry.type == fs.FileType.File:
                _sort_in(found, entry.path, beside)
    found.files.sort()
    if not found.files and not found.bad_rows:
        rest = found.describe_left_out()
        raise DataError(
            f"folder {path} is an empty set: it holds no image{f' ({rest})' if rest else ''}; {expected}; check the path"
        )
    return found


def _plugin(suffix: str) -> str:
    return f" (to read them: pip install {PLUGINS[suffix]})" if suffix in PLUGINS else ""


def _sort_in(found: ImageFiles, path: str, beside: Container[str], seen: Callable[[], bool] = lambda: False) -> None:
    """Put one file where it belongs; seen: whether it was found before."""
    parts = path.removeprefix(found.root).strip("/").split("/")
    suffix = PurePosixPath(parts[-1]).suffix.lower()
    if any(_is_hidden(part) for part in parts):
        found.left_out[HIDDEN] += 1
    elif suffix in suffixes():
        if seen():
            found.left_out[REPEATED] += 1
        elif is_text(path):
            found.files.append(path)
        else:
            reason = f"the name is not UTF-8; rename it, {SKIP_HINT}"
            found.bad_rows.append(BadRow(printable(path), len(found.bad_rows), reason))
    elif suffix not in beside and path not in beside:
        found.left_out[printable(suffix) or "without an ending"] += 1


def _walk(found: ImageFiles, beside: Container[str]) -> None:
    """All files below a local folder: first without links, then what links lead to and is not there yet."""
    seen: set[tuple[int, int]] = set()
    folders: list[str] = [found.root]
    links: list[str] = []

    def been_there(path: str) -> bool:
        stat = os.stat(path)
        key = stat.st_dev, stat.st_ino
        known = key in seen
        seen.add(key)
        return known

    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        if os.path.isfile(folder):
            _sort_in(found, folder, beside, functools.partial(been_there, folder))
            continue
        if not os.path.exists(folder):
            found.left_out[NOWHERE] += 1
            continue
        if been_there(folder):
            found.left_out[REPEATED] += 1
            continue
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            reason = f"the folder cannot be read ({error.strerror}); correct its permissions, {SKIP_HINT}"
            found.bad_rows.append(BadRow(printable(folder), len(found.bad_rows), reason))
            continue
        for entry in entries:
            if _is_hidden(entry.name):
                found.left_out[HIDDEN] += 1
            elif entry.is_symlink():
                links.append(entry.path)
            elif entry.is_dir():
                folders.append(entry.path)
            elif entry.is_file():
                _sort_in(found, entry.path, beside)
                been_there(entry.path)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM
