"""Drawing many samples on Ray, in parts that are measured and kept: a run that is broken off goes on where it was."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ctrl_ray.config import ScalingConfig
from ctrl_ray.distributed.sampling import SamplingJob, sample_policy
from ctrl_ray.rewards.model import RewardModelSpec
from ctrl_ray.verification.measured import Measured, join, load, measure_samples, save
from ctrl_ray.wording import duration

_LARGEST_PART = 1024
_BATCHES_A_PART = 16


@dataclass(frozen=True, kw_only=True)
class Drawer:
    """Draws the samples of one job with consecutive ids, in parts of a few batches."""

    job: SamplingJob
    """Its sample_ids are not used."""
    rewards: RewardModelSpec
    scaling: ScalingConfig
    first_id: int
    folder: Path
    """Where measured parts are kept, below a folder named by what they depend on."""
    say: Callable[[str], None]

    def draw(self, count: int) -> Measured:
        """The first `count` samples: what is known of them is read, the others are drawn."""
        parts = self._known()
        done = sum(map(len, parts))
        started, drawn_before = time.monotonic(), done
        while done < count:
            size = min(_LARGEST_PART, _BATCHES_A_PART * self.job.batch_size, count - done)
            ids = range(self.first_id + done, self.first_id + done + size)
            samples = sample_policy(dataclasses.replace(self.job, sample_ids=tuple(ids)), self.rewards, self.scaling)
            parts.append(measure_samples(samples, self.job.controls))
            save(parts[-1], self._kept() / f"{done:09d}.safetensors")
            done += size
            left = duration((time.monotonic() - started) / (done - drawn_before) * (count - done))
            kind = "pre-trained" if self.job.reference else "fine-tuned"
            self.say(f"{done}/{count} {kind} samples · {left} left")
        return join(parts).first(count)

    def _known(self) -> list[Measured]:
        """The kept parts, up to the first one that is missing."""
        parts: list[Measured] = []
        for file in sorted(self._kept().glob("*.safetensors")):
            if int(file.stem) != sum(map(len, parts)):
                break
            parts.append(load(file))
        return parts

    def _kept(self) -> Path:
        inputs = {
            "job": {
                f.name: repr(getattr(self.job, f.name)) for f in dataclasses.fields(self.job) if f.name not in _NOT_SEEN
            },
            "files": [files_below(folder) for folder in (self.job.adapter, *self.rewards.classifiers.values())],
            "first_id": self.first_id,
        }
        digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
        return self.folder / ("pre-trained" if self.job.reference else "fine-tuned") / digest[:16]


_NOT_SEEN = ("sample_ids", "batch_size", "copies", "draw")
"""Fields of a job that leave sample i as it is."""


def files_below(folder: str | None) -> list[tuple[str, int, int]]:
    """Name, bytes and time of change of every file below a folder: two that agree in it hold the same."""
    found = sorted(path for path in Path(folder or "").rglob("*") if path.is_file()) if folder else []
    return [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in found]
