"""The folder of a run: local, or local with a copy on any filesystem that pyarrow opens (s3://, gs://, …)."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any

import pyarrow.fs

from ctrl_ray.config import TrainConfig
from ctrl_ray.config.json import read_train_config, to_json
from ctrl_ray.embedded import FOLDER
from ctrl_ray.errors import ConfigError, RunFolderError
from ctrl_ray.runs.claim import CLAIM_FILE, claimed, clear, discarded_on_error, holds_files, holds_worth
from ctrl_ray.runs.copies import CLASSIFIER
from ctrl_ray.runs.files import write_whole
from ctrl_ray.runs.outputs import kept_path

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
ADAPTER = "adapter"
_MAY_CHANGE = ("output_dir", "num_updates", "scaling", "rewards", "evaluation", "num_checkpoints_to_keep", "tracker",
               "checkpoint_every_updates", "target_kl", "export_images")  # fmt: skip


class RunFolder:
    """Where a run writes. `local` is always a local folder; `upload` copies it to the remote place, if there is one."""

    def __init__(self, output_dir: str) -> None:
        self.output_dir = output_dir
        self._filesystem: pyarrow.fs.FileSystem | None = None
        self._remote_path = ""
        self._uploaded: dict[str, tuple[int, int]] = {}
        if "://" in output_dir and not output_dir.startswith("file://"):
            try:
                self._filesystem, path = pyarrow.fs.FileSystem.from_uri(output_dir)
                self._remote_path = path.rstrip("/")
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise ConfigError(
                    f"output_dir {output_dir!r} cannot be opened: {error}; give a local path or a URI that pyarrow.fs "
                    "knows (s3://, gs://, hdfs://)"
                ) from error
            key = hashlib.sha256(output_dir.encode()).hexdigest()[:12]
            self.local = Path(tempfile.gettempdir()) / f"ctrl_ray_{key}"
        else:
            self.local = kept_path(output_dir)

    @property
    def is_local(self) -> bool:
        """Whether the run is written to this machine's file system (which may be a shared one) alone."""
        return self._filesystem is None

    @property
    def name(self) -> str:
        """The run's name: the last part of its path. Ray Train and Aim show it."""
        return self._remote_path.rpartition("/")[2] if self._filesystem is not None else self.local.name

    @property
    def storage_path(self) -> str:
        """What Ray Train stores checkpoints under."""
        return self.output_dir if self._filesystem is not None else str(self.local)

    def __truediv__(self, name: str) -> Path:
        return self.local / name

    def check(self, config: TrainConfig, *, resume: bool) -> None:
        """RunFolderError / ConfigError when what is there does not fit `resume`; a remote run to resume is fetched."""
        if self._filesystem is not None:
            if resume:
                self._download()
            elif not self._remote_exists():
                clear(self.local)  # what a run that is gone left here
        stored = self.local / CONFIG_FILE
        if not resume:
            if holds_files(self.local) or self._remote_exists():
                raise RunFolderError(
                    f"output folder {self.output_dir} already holds {'a run' if stored.exists() else 'files'}; give "
                    "another --output-dir, or go on with that run by --resume"
                )
        elif not stored.is_file():
            raise RunFolderError(
                f"output folder {self.output_dir} holds no run to resume ({CONFIG_FILE} is missing); leave out --resume"
            )
        else:
            old = read_train_config(stored)
            changed = changed_settings(old, config)
            if changed:
                raise ConfigError(
                    f"cannot resume {self.output_dir} with other settings: {'; '.join(changed)}. Give the old values, or "
                    "start a new run with another --output-dir"
                )

    @contextmanager
    def claimed(self, config: TrainConfig, *, resume: bool) -> Iterator[None]:
        """Inside, the folder is this process's alone, and `check` holds. A new run that fails before it has come to anything
        (`has_begun`) leaves nothing, so that it can be started again."""
        with claimed(self.local):
            self.check(config, resume=resume)
            if resume:
                yield
                return
            try:
                with discarded_on_error(self.local, lambda path: is_copy_or_draft(path, config)):
                    yield
            except BaseException:
                if not holds_files(self.local):
                    self._discard_remote()
                raise

    def has_begun(self, config: TrainConfig) -> bool:
        """Whether the run has left anything that would have to be computed again."""
        return holds_worth(self.local, lambda path: is_copy_or_draft(path, config))

    def prepare(self, config: TrainConfig, *, resume: bool) -> None:
        """`check`, then make the folder and write config.json."""
        self.check(config, resume=resume)
        self.local.mkdir(parents=True, exist_ok=True)
        write_whole(self.local / CONFIG_FILE, to_json(config) + "\n")
        self.upload()

    def upload(self, *names: str) -> None:
        """Copy what changed to the remote place, if there is one: everything but the checkpoints (Ray Train puts them
        there itself), or the files `names` alone."""
        if self._filesystem is None:
            return
        paths = [self.local / name for name in names] if names else sorted(self.local.rglob("*"))
        for path in paths:
            relative = path.relative_to(self.local).as_posix()
            if not path.is_file() or relative.partition("/")[0] in (CHECKPOINTS, CLAIM_FILE):
                continue
            state = (path.stat().st_size, path.stat().st_mtime_ns)
            if self._uploaded.get(relative) == state:
                continue
            target = f"{self._remote_path}/{relative}"
            self._filesystem.create_dir(target.rsplit("/", 1)[0], recursive=True)
            with path.open("rb") as source, self._filesystem.open_output_stream(target) as sink:
                shutil.copyfileobj(source, sink, 2**20)
            self._uploaded[relative] = state

    def _discard_remote(self) -> None:
        """Remove what `upload` has put there."""
        if self._filesystem is not None:
            for relative in self._uploaded:
                with suppress(OSError):
                    self._filesystem.delete_file(f"{self._remote_path}/{relative}")

    def _remote_exists(self) -> bool:
        if self._filesystem is None:
            return False
        info = self._filesystem.get_file_info(f"{self._remote_path}/{CONFIG_FILE}")
        return info.type != pyarrow.fs.FileType.NotFound

    def _download(self) -> None:
        assert self._filesystem is not None
        self.local.mkdir(parents=True, exist_ok=True)
        selector = pyarrow.fs.FileSelector(self._remote_path, recursive=True, allow_not_found=True)
        for info in self._filesystem.get_file_info(selector):
            relative = Path(info.path).relative_to(self._remote_path)
            if info.type == pyarrow.fs.FileType.File and relative.parts[0] != CHECKPOINTS:
                target = self.local / relative
                target.parent.mkdir(parents=True, exist_ok=True)
                with self._filesystem.open_input_stream(info.path) as source:
                    target.write_bytes(source.read())


def below(storage_path: str, name: str) -> str:
    """A folder in a local folder or below a URI, whose options (`?region=…`) stay at its end."""
    if "://" not in storage_path:
        return f"{storage_path}/{name}"
    path, mark, options = storage_path.partition("?")
    return f"{path.rstrip('/')}/{name}{mark}{options}"


def is_copy_or_draft(path: PurePath, config: TrainConfig) -> bool:
    """Whether a file of a run's folder is only a copy of what the user gave, or half of something."""
    if path.parts[0] == CLASSIFIER and len(path.parts) > 2:
        control = config.controls.get(path.parts[1])
        return control is None or control.classifier is not None or path.parts[2].startswith(".")
    return path.name == CONFIG_FILE or path.name.endswith(".draft")


def changed_settings(old: TrainConfig, new: TrainConfig) -> list[str]:
    """'name: old → new' of every setting that a resumed run must not change."""
    before, after = _flat(dataclasses.asdict(old)), _flat(dataclasses.asdict(new))
    return [
        f"{name}: {before.get(name)!r} → {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if not _same(before.get(name), after.get(name)) and name.split(".")[0] not in _MAY_CHANGE
    ]


def _same(old: Any, new: Any) -> bool:
    """Whether two values mean the same: a part of the package is the same wherever it is installed."""
    if old == new or not (isinstance(old, str) and isinstance(new, str) and Path(new).is_relative_to(FOLDER)):
        return bool(old == new)
    shipped = Path(new).relative_to(FOLDER.parents[1]).parts
    return Path(old).parts[-len(shipped) :] == shipped


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
