"""Paths on any file system that `pyarrow.fs` opens: a local path, or a URI such as s3://bucket/folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from ctrl_ray.errors import DataError
from ctrl_ray.offline.text import json_line


def resolve(path: str | Path) -> tuple[fs.FileSystem, str]:
    """File system of `path` and the path on it; a local path becomes absolute, so that workers find it as well."""
    text = str(path)
    if not text.strip():
        raise DataError("a path is empty; expected a file or folder, such as . for the working directory")
    if "\0" in text or not is_text(text):
        raise DataError(f"path '{printable(text)}' holds bytes that are not UTF-8; rename the file or folder")
    if "://" not in text:
        return fs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    try:
        return fs.FileSystem.from_uri(text)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(
            f"{text} cannot be opened ({error}); expected a local path or a URI that pyarrow.fs opens, e.g. s3://"
        ) from error


def is_text(path: str) -> bool:
    """Whether all of a path is UTF-8, as everything but the local disk wants it."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(path: str) -> str:
    """A path as it can be printed: bytes that are no UTF-8 as \\xe9."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def look_at(path: str | Path) -> tuple[fs.FileSystem, str, fs.FileType]:
    """`resolve`, and whether there is a file, a folder or nothing; DataError where that cannot be known."""
    filesystem, location = resolve(path)
    try:
        return filesystem, location, filesystem.get_file_info(location).type
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be looked at ({error}); check the path, and the rights and address to reach it"
        ) from error


def kind(path: str | Path) -> fs.FileType:
    """Whether `path` is a file, a folder, or not there."""
    return look_at(path)[2]


def list_files(path: str | Path, suffixes: tuple[str, ...], what: str) -> tuple[fs.FileSystem, list[str]]:
    """The file `path`, or all files below the folder `path` whose name ends in one of `suffixes`, sorted.

    Names that start with a dot or an underscore are left out. Raises DataError when there is none; `what` names what
    was looked for.
    """
    filesystem, location, found_there = look_at(path)
    if found_there == fs.FileType.File:
        return filesystem, [location]
    if found_there == fs.FileType.NotFound:
        raise DataError(f"{path} does not exist; expected {what}; check the path")
    root = location.rstrip("/") + "/"
    found = sorted(
        entry.path
        for entry in filesystem.get_file_info(fs.FileSelector(location, recursive=True))
        if entry.type == fs.FileType.File
        and entry.path.lower().endswith(suffixes)
        and not any(part.startswith((".", "_")) for part in entry.path.removeprefix(root).split("/"))
    )
    if not found:
        raise DataError(
            f"folder {path} is an empty set: it holds no row, because no file in it ends in {', '.join(suffixes)}; "
            f"expected {what}; check the path"
        )
    return filesystem, found


def read_bytes(filesystem: fs.FileSystem, file: str) -> bytes:
    """All bytes of a file."""
    with filesystem.open_input_stream(file, compression=None) as stream:
        return stream.read()


def write_json_lines(path: str | Path, rows: Iterable[dict[str, object]]) -> None:
    """One JSON object a line, UTF-8; missing folders are made."""
    filesystem, location = resolve(path)
    if isinstance(filesystem, fs.LocalFileSystem):
        Path(location).parent.mkdir(parents=True, exist_ok=True)
    with filesystem.open_output_stream(location, compression=None) as stream:
        for row in rows:
            stream.write(json_line(row).encode())
