"""Where a run's curves and pictures go, besides metrics.jsonl and the report."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ctrl_ray.errors import ConfigError

TrackerKind = Literal["aim", "tensorboard", "none"]
_KINDS: tuple[TrackerKind, ...] = ("aim", "tensorboard", "none")


class Tracker(NamedTuple):
    """A tracker and its place."""

    kind: TrackerKind
    repo: str | None
    """For Aim, a repository other than RUN/aim: a folder or 'aim://HOST:PORT'."""

    @property
    def title(self) -> str:
        """What messages call it."""
        return {"aim": "Aim", "tensorboard": "TensorBoard", "none": "no tracker"}[self.kind]


def parse_tracker(text: str) -> Tracker:
    """'aim', 'tensorboard', 'none', 'aim://HOST:PORT' of a tracking server, or 'aim:FOLDER'; ConfigError for anything else."""
    if text in _KINDS:
        return Tracker(text, None)
    if text.startswith("aim://"):
        return Tracker("aim", text)
    if text.startswith("aim:") and "://" not in text and len(text) > len("aim:"):
        return Tracker("aim", text.removeprefix("aim:"))
    raise ConfigError(
        f"tracker is {text!r}; expected {', '.join(_KINDS)}, aim://HOST:PORT of a tracking server (aim server), or aim:FOLDER "
        "of another repository"
    )


def earlier_tracker(aim: object, aim_repo: object) -> str:
    """What the settings `aim` and `aim_repo` of earlier versions are now."""
    if not aim:
        return "none"
    return "aim" if not aim_repo else str(aim_repo) if str(aim_repo).startswith("aim://") else f"aim:{aim_repo}"
