"""Writing one run into an Aim repository or to a tracking server; the only module that imports aim."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ctrl_ray.runs.copies import private_folder

RUN_FILE = "run_hash"


class AimSink:
    """One Aim run in a repository, of which this process is the only writer.

    Aim 3.28 sends nothing over the network by itself. Its system metrics, terminal capture, and record of environment
    variables and git state are off, so that a repository can be given away. On resume, steps that are done again take
    the place of the earlier ones.

    Args:
        repo: Folder of the repository, made when missing, or 'aim://HOST:PORT' of a tracking server (`aim server`).
        run_file: Remembers which run it is.
        run_name: Name shown by `aim up`.
        config: Settings; any value that JSON can hold.
        resume: Go on with the run that `run_file` names, when there is one.
        experiment: What runs that belong together have in common.
        knobs: Settings to search for by `run.knobs.NAME`, in place of the long way through `run.config`.
    """

    def __init__(
        self,
        repo: str | Path,
        *,
        run_file: Path,
        run_name: str,
        config: Mapping[str, Any],
        resume: bool,
        experiment: str | None = None,
        knobs: Mapping[str, Any] | None = None,
    ) -> None:
        logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every table it creates
        import aim

        run_hash = run_file.read_text().strip() if resume and run_file.is_file() else None
        if run_hash:
            logging.getLogger("aim.sdk.lock_manager").setLevel(logging.ERROR)  # a killed run's lock is expected here
        if is_server(repo):
            opened = aim.Repo(str(repo))
        else:
            Path(repo).mkdir(parents=True, exist_ok=True)
            opened = aim.Repo.from_path(str(_plainly_named(Path(repo))), init=True)
        self._aim = aim
        self._run = aim.Run(
            run_hash=run_hash,
            repo=opened,
            force_resume=run_hash is not None,
            system_tracking_interval=None,
            log_system_params=False,
            capture_terminal_logs=False,
        )
        run_file.parent.mkdir(parents=True, exist_ok=True)
        run_file.write_text(f"{self._run.hash}\n")
        self._run.name = run_name
        if experiment is not None:
            self._run.experiment = experiment
        self._run["config"] = _plain(config)
        if knobs is not None:
            self._run["knobs"] = _plain(knobs)

    @property
    def run_hash(self) -> str:
        """The run's key in the repository."""
        return str(self._run.hash)

    def log_metrics(self, kind: str, update: int, metrics: Mapping[str, float]) -> None:
        """Track every metric at step `update`; `accuracy/jpeg_size` becomes `accuracy` with the control as context."""
        for name, value in metrics.items():
            family, _, control = name.partition("/")
            context = {"kind": kind, "control": control} if control else {"kind": kind}
            self._run.track(value, name=family, step=update, context=context)

    def log_images(self, update: int, name: str, images: Sequence[Image.Image], captions: Sequence[str]) -> None:
        """Track a list of images at step `update`."""
        pairs = zip(images, captions, strict=True)
        self._run.track([self._aim.Image(image, caption=text) for image, text in pairs], name=name, step=update)

    def close(self) -> None:
        """Finish the run, so that `aim up` shows it as done."""
        self._run.close()


def is_server(repo: str | Path) -> bool:
    """Whether this is the address of a tracking server rather than a folder."""
    return str(repo).startswith("aim://")


def _plainly_named(repo: Path) -> Path:
    """The folder, or a link to it where its path has signs that mean something in an address: Aim makes the address of its
    database of the path as it stands. The link stays: Aim writes until the process ends."""
    target = str(repo.absolute())
    if not set("%?#") & set(target):
        return repo
    link = private_folder("aim") / hashlib.sha256(target.encode()).hexdigest()[:16]
    if not link.is_symlink():
        link.symlink_to(target, target_is_directory=True)
    return link


def _plain(value: Any) -> Any:
    """`value` with tuples as lists and anything that Aim cannot hold as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
