"""Where a command is to write: made absolute once, and tried before anything else is done."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Literal

from ctrl_ray.errors import ConfigError
from ctrl_ray.ray_internals import is_copy_of_job

_LONGEST_NAME = 255
"""Bytes of a file's name on Linux' file systems."""
_COMPANION = len(".bad_rows.jsonl") + 1
"""Bytes that names of files beside an output file are longer than its own."""


def check_output(
    path: str | Path,
    option: str = "--output-dir",
    *,
    kind: Literal["folder", "file"] = "folder",
    remedy: str | None = None,
) -> str:
    """The absolute path of an output that can be written; what holds a scheme ('s3://…') passes as it is.

    A folder of that path may be there, and so may a file where `kind` is 'file'. Nothing is made: the nearest folder that
    exists is tried with a file that has no name. `option` is how the user gave it, for the message, and `remedy` what to do
    about it; None: give another.

    Raises ConfigError when the output cannot be written, with the place that is in the way and the reason.
    """
    text = os.fspath(path)
    if "://" in text and not text.startswith("file://"):
        return text
    place = kept_path(text, option)
    refusal = _in_the_way(place, kind)
    if refusal is not None:
        raise ConfigError(
            f"output {text!r} of {option} cannot be written: {refusal}; expected a {kind} that this user can write; "
            + (remedy or f"give another {option}")
        )
    return str(place)


def kept_path(text: str, option: str = "--output-dir") -> Path:
    """A local output as an absolute path. In a Ray job the working directory is a copy that Ray removes: a relative path
    is then meant from the home folder. ConfigError for what is no path."""
    try:
        if not text or "\0" in text:
            raise ValueError("it is empty" if not text else "it holds a zero byte")
        text.encode()  # names of other encodings reach us with halves of surrogate pairs, which no JSON file holds
        path = Path(text.removeprefix("file://")).expanduser()
        working = Path.cwd()
        if not path.is_absolute() and is_copy_of_job(working):
            working = Path.home()
        return (working / path).resolve()
    except UnicodeEncodeError:
        reason = "its bytes are not UTF-8"
    except FileNotFoundError:
        reason = "the working directory has been removed"
    except (
        ValueError,
        RuntimeError,
        OSError,
    ) as error:  # RuntimeError: an unknown user after '~', or links in a circle
        reason = str(error)
    raise ConfigError(f"output {text!r} of {option} is no path: {reason}; give another {option}")


def _in_the_way(place: Path, kind: Literal["folder", "file"]) -> str | None:
    """Why an output cannot be written at an absolute path; None when it can."""
    longest = _LONGEST_NAME - (_COMPANION if kind == "file" else 0)
    for name in place.parts:
        if (size := len(name.encode())) > longest:
            return f"the name {name[:20]}…{name[-10:]} has {size} bytes, {longest} are possible"
    try:
        if place.exists() and kind == "file" and not place.is_file():
            return f"{place} is {_sort(place)}, where a file is meant"
        parent = place.parent if kind == "file" else place
        while not os.path.lexists(parent):
            parent = parent.parent
        if not parent.is_dir():
            return f"{parent} is {_sort(parent)}, where a folder is meant"
        with os.scandir(parent), tempfile.TemporaryFile(dir=parent):
            return None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            return f"the path is too long, with {len(os.fsencode(place))} bytes"
        where = error.filename if isinstance(error.filename, str) and os.path.lexists(error.filename) else parent
        return f"{where}: {_reason(error)}"


def _sort(place: Path) -> str:
    return "a folder" if place.is_dir() else "a file" if place.is_file() else "no file and no folder"


def _reason(error: OSError) -> str:
    known = {
        errno.EACCES: "no permission to write there",
        errno.EPERM: "no permission to write there",
        errno.EROFS: "the file system is read-only",
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the quota is used up",
    }
    return known.get(error.errno or 0, f"writing there fails ({error.strerror})")
