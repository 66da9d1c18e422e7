"""An output folder belongs to one process at a time, and a start that fails leaves nothing of itself there."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import IO

from ctrl_ray.errors import RunFolderError

CLAIM_FILE = ".claim"
"""In the folder while a process writes there; who it is. The lock on it ends with the process, whatever ends that."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What file systems without locks answer: there two runs at once are not told from each other."""


@contextmanager
def claimed(folder: Path, file: str | None = None) -> Iterator[None]:
    """Inside, the folder is there, and no other process gets through here with it. RunFolderError where one has it now.

    file: Claim this file in the folder alone. What was made for it is gone afterwards if nothing was put there.
    """
    place = folder / (CLAIM_FILE if file is None else f".{file}{CLAIM_FILE}")
    what = f"output folder {folder}" if file is None else f"output {folder / file}"
    made = next((parent for parent in reversed([folder, *folder.parents]) if not parent.exists()), None)
    claim = _claim(place, what)
    try:
        yield
    finally:
        place.unlink(missing_ok=True)
        claim.close()
        if made is not None:
            _remove_empty(folder, made)


@contextmanager
def discarded_on_error(folder: Path, is_worthless: Callable[[PurePath], bool]) -> Iterator[None]:
    """After an error inside, empty the folder, unless it holds a file that is of worth. It was empty before.

    is_worthless: tells by the path below the folder whether a file can be had again for nothing.
    """
    try:
        yield
    except BaseException:
        if not holds_worth(folder, is_worthless):
            clear(folder)
        raise


def holds_worth(folder: Path, is_worthless: Callable[[PurePath], bool]) -> bool:
    """Whether a file is there that is not worthless."""
    files = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return any(not is_worthless(path.relative_to(folder)) for path in files if path.name != CLAIM_FILE)


def holds_files(folder: Path) -> bool:
    """Whether anything but a claim is there, or the draft of a start that was killed."""
    return folder.is_dir() and any(
        path.name != CLAIM_FILE and not path.name.endswith(".draft") for path in folder.iterdir()
    )


def clear(folder: Path) -> None:
    """Empty the folder, but for its claim."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != CLAIM_FILE:
            path.unlink(missing_ok=True)


def _claim(path: Path, what: str) -> IO[str]:
    """The file that holds the claim, locked. One that another process unlinked meanwhile is worth nothing: again then."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return file
            file.seek(0)
            who = file.read().strip() or "another process"
            file.close()
            raise RunFolderError(
                f"{what} is in use: {who} writes there now; wait for its end, or give another output"
            ) from None
        if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            return file
        file.close()


def _remove_empty(folder: Path, upmost: Path) -> None:
    """Remove the folder and those above it up to `upmost`, as long as they are empty."""
    with suppress(OSError):
        for place in [folder, *folder.parents]:
            place.rmdir()
            if place == upmost:
                return
