"""A folder by value: its files travel to a process on another host, which has no disk in common with this one."""

from __future__ import annotations

import hashlib
import os
import tempfile
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CLASSIFIER = "classifier"
"""Sub-folder of a run, and of an adapter, with a fitted classifier for each control."""


@dataclass(frozen=True)
class FolderCopy:
    """The files of a small folder (an adapter, a classifier), to be sent to another host."""

    files: Mapping[str, bytes]
    """Content by path relative to the folder, with '/'."""

    @classmethod
    def read(cls, folder: str | Path) -> FolderCopy:
        """Everything below `folder`, links followed; without the classifiers that an adapter carries for its users, which
        travel by themselves."""
        root = Path(folder)
        paths = sorted(
            path for path in root.rglob("*") if path.is_file() and path.relative_to(root).parts[0] != CLASSIFIER
        )
        return cls({path.relative_to(root).as_posix(): path.read_bytes() for path in paths})

    @property
    def digest(self) -> str:
        """SHA-256 over names and contents."""
        total = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            total.update(f"{name}\0{len(content)}\0".encode())
            total.update(content)
        return total.hexdigest()

    def here(self) -> Path:
        """The folder on this host: written at the first call, found again by its content afterwards.

        It lies below a folder of the temporary directory that only this user can enter.
        """
        parent = private_folder("copies")
        target = parent / self.digest
        if not target.is_dir():
            half = parent / f".{uuid.uuid4().hex}"
            for name, content in self.files.items():
                file = (half / name).resolve()
                assert file.is_relative_to(half.resolve()), name
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
            try:
                half.rename(target)
            except OSError:  # another process of this host was faster; its files are the same
                if not target.is_dir():
                    raise
        return target


def private_folder(purpose: str) -> Path:
    """A folder of the temporary directory that only this user can enter; it stays."""
    folder = Path(tempfile.gettempdir()) / f"ctrl_ray_{purpose}_{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid() or folder.is_symlink():
        raise PermissionError(f"{folder} belongs to another user; remove it, or set TMPDIR to a folder of your own")
    return folder


def folder_here(path: str, copies: Mapping[str, FolderCopy]) -> str:
    """Where `path` lies on this host: itself, or its copy where one travelled along."""
    return str(copies[path].here()) if path in copies else path
