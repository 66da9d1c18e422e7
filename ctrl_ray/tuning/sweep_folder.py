"""The folder of a sweep: what it was asked, so that it can go on, and where its parts lie."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from ctrl_ray.config import TrainConfig
from ctrl_ray.config.json import to_json, train_config_from_json
from ctrl_ray.errors import ConfigError, RunFolderError
from ctrl_ray.runs.claim import claimed, discarded_on_error, holds_files, holds_worth
from ctrl_ray.runs.files import write_whole
from ctrl_ray.runs.folder import changed_settings, is_copy_or_draft
from ctrl_ray.runs.outputs import check_output
from ctrl_ray.tuning.space import Space

SWEEP_FILE, SPACE_FILE = "sweep.json", "space.py"
TUNE = "tune"


@dataclass(frozen=True)
class SweepFolder:
    """sweep.json, space.py, classifier/, before.safetensors, trials/NAME/ (run folders), tune/, aim/, adapter/, report.html."""

    path: Path

    @staticmethod
    def at(output_dir: str) -> SweepFolder:
        """ConfigError for what is no path: the trials' drivers and the sweep's own read and write the same files."""
        if "://" in output_dir and not output_dir.startswith("file://"):
            raise ConfigError(
                f"output_dir of a sweep is {output_dir!r}; expected a folder (on several machines one that all of them mount)"
            )
        return SweepFolder(Path(check_output(output_dir)))

    @property
    def name(self) -> str:
        """Name of the sweep: Aim's experiment."""
        return self.path.name

    @property
    def tune(self) -> Path:
        """Ray Tune's own state."""
        return self.path / TUNE

    @contextmanager
    def claimed(self, space: Space, asked: TrainConfig, num_samples: int | None, *, resume: bool) -> Iterator[int]:
        """Inside, the folder is this process's alone and `prepare` has been done, whose answer it gives. A new sweep that
        fails before it has come to anything leaves nothing."""
        with claimed(self.path):
            wanted = self.prepare(space, asked, num_samples, resume=resume)
            if resume:
                yield wanted
                return
            with discarded_on_error(self.path, lambda path: _is_worthless(path, asked)):
                yield wanted

    def has_begun(self, asked: TrainConfig) -> bool:
        """Whether the sweep has left anything that would have to be computed again."""
        return holds_worth(self.path, lambda path: _is_worthless(path, asked))

    def prepare(self, space: Space, asked: TrainConfig, num_samples: int | None, *, resume: bool) -> int:
        """Check the folder, write down what is asked; returns the number of samples to draw.

        RunFolderError when a new sweep finds files, or a resumed one no sweep; ConfigError when the resumed one is asked
        for something else.
        """
        file = self.path / SWEEP_FILE
        if not resume:
            if holds_files(self.path):
                raise RunFolderError(
                    f"output folder {self.path} already holds {'a sweep' if file.is_file() else 'files'}; give another "
                    "--output-dir, or go on with that sweep by --resume"
                )
            wanted = 16 if num_samples is None else num_samples
            self.path.mkdir(parents=True, exist_ok=True)
            facts = {"name": space.name, "metric": space.metric, "mode": space.mode, "knobs": sorted(space.knobs)}
            stored = {**facts, "num_samples": wanted, "base": json.loads(to_json(asked))}
            draft = self.path / f"{SPACE_FILE}.draft"  # no sweep is there until the last line
            draft.write_text(space.source, encoding="utf-8")
            write_whole(file, json.dumps(stored, indent=2) + "\n")
            draft.replace(self.path / SPACE_FILE)
            return wanted
        if not file.is_file():
            raise RunFolderError(
                f"output folder {self.path} holds no sweep to resume ({SWEEP_FILE} is missing); leave out --resume"
            )
        return self._check_same(json.loads(file.read_text(encoding="utf-8")), space, asked, num_samples)

    def _check_same(self, stored: dict[str, Any], space: Space, asked: TrainConfig, num_samples: int | None) -> int:
        old = train_config_from_json(json.dumps(stored["base"]), source=str(self.path / SWEEP_FILE))
        changed = changed_settings(old, asked)
        if num_samples not in (None, stored["num_samples"]):
            changed.append(f"num_samples: {stored['num_samples']} → {num_samples}")
        for name, value in (("metric", list(space.metric)), ("mode", list(space.mode)), ("knobs", sorted(space.knobs))):
            if stored[name] != value:
                changed.append(f"{name}: {stored[name]} → {value}")
        if space.source and (self.path / SPACE_FILE).read_text(encoding="utf-8") != space.source and not changed:
            changed.append(f"the sweep file differs from {self.path / SPACE_FILE}")
        if changed:
            raise ConfigError(
                f"cannot resume the sweep in {self.path} with other settings: {'; '.join(changed)}. Give the old ones (its "
                f"file is kept as {self.path / SPACE_FILE}), or start a new sweep with another --output-dir"
            )
        return int(stored["num_samples"])


def _is_worthless(path: PurePath, asked: TrainConfig) -> bool:
    return path.name in (SWEEP_FILE, SPACE_FILE) or is_copy_or_draft(path, asked)
