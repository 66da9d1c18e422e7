"""What the sweep's driver does while trials run: the table, Aim, and giving back what ended trials still hold."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from ctrl_ray.cluster.abandoned_groups import give_back_abandoned_groups
from ctrl_ray.config import TrainConfig
from ctrl_ray.config.overrides import override
from ctrl_ray.tuning.live_table import LiveTable
from ctrl_ray.tuning.results.tracking import SweepTracker
from ctrl_ray.tuning.results.trials import Status, SweepTrial, format_trials
from ctrl_ray.tuning.trial import ERROR_FILE, seconds_before, trial_folder, trial_name

_LOOK_EVERY_S = 1.0
_LAST_TRIALS_END_S = 10.0
_FOLLOWERS: dict[str, SweepFollower] = {}


class SweepFollower:
    """Follows one sweep; Ray Tune reaches it through `callback`.

    Args:
        folder: Of the sweep.
        base: Config that all trials start from.
        knobs: Paths that vary, in the order of the table's columns.
        tracker: Copies the trials' curves to Aim; None: no Aim.
    """

    def __init__(self, folder: Path, base: TrainConfig, knobs: Sequence[str], tracker: SweepTracker | None) -> None:
        self._folder, self._base, self._knobs, self._tracker = folder, base, list(knobs), tracker
        self._table = LiveTable()
        self._started: dict[str, float] = {}
        self._states: dict[str, Status] = {}
        self._last_look = 0.0
        self._groups_before = give_back_abandoned_groups()
        self.trials: list[SweepTrial] = []

    @property
    def callback(self) -> tune.Callback:
        """For Ray Tune, which pickles its callbacks with its state."""
        _FOLLOWERS[str(self._folder)] = self
        return _Relay(str(self._folder))

    def look(self, trials: Iterable[Trial], *, now: bool = False) -> None:
        """Bring `self.trials`, the table and Aim up to date, when it is time."""
        if not now and time.monotonic() - self._last_look < _LOOK_EVERY_S:
            return
        self._last_look = time.monotonic()
        give_back_abandoned_groups()
        self.trials = sorted((self._plain(trial) for trial in trials), key=lambda trial: trial.name)
        if self._tracker is not None:
            self._tracker.follow(self.trials)
        states = {trial.name: trial.status for trial in self.trials}
        self._table.show(format_trials(self.trials, self._knobs), now=now or states != self._states)
        self._states = states

    def close(self) -> None:
        """Give back what the last trials hold, once they are gone."""
        limit = time.monotonic() + _LAST_TRIALS_END_S
        while give_back_abandoned_groups() > self._groups_before and time.monotonic() < limit:
            time.sleep(_LOOK_EVERY_S / 4)
        _FOLLOWERS.pop(str(self._folder), None)

    def _plain(self, trial: Trial) -> SweepTrial:
        result, folder = trial.last_result or {}, trial_folder(self._folder, trial.trial_id).local
        status = _status(trial)
        if status == "running":
            self._started.setdefault(trial.trial_id, time.monotonic())
        since = self._started.get(trial.trial_id)
        session_s = (
            time.monotonic() - since if since is not None and status == "running" else result.get("time_total_s", 0)
        )
        knobs = {path: trial.config[path] for path in self._knobs if path in trial.config}
        strength, kl_coef = _strength(self._base, knobs)
        return SweepTrial(
            name=trial_name(trial.trial_id),
            knobs=knobs,
            status=status,
            guidance_strength=strength,
            kl_coef=kl_coef,
            updates_done=int(result.get("updates_done", 0)),
            metrics={name: float(value) for name, value in result.items() if type(value) in (int, float)},
            seconds=float(result.get("seconds", session_s + seconds_before(folder))),
            error=_error(trial, folder) if status == "failed" else "",
            folder=folder,
        )


class _Relay(tune.Callback):
    """Ray Tune's callback, picklable: it finds the follower of this process by the sweep's folder."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def _tell(self, action: Callable[[SweepFollower], None]) -> None:
        follower = _FOLLOWERS.get(self._folder)
        if follower is not None:
            action(follower)

    def on_step_end(self, iteration: int, trials: Any, **info: Any) -> None:
        self._tell(lambda follower: follower.look(trials))


def _status(trial: Trial) -> Status:
    if trial.status == Trial.TERMINATED:
        return "finished" if (trial.last_result or {}).get("final") else "stopped early"
    if trial.status == Trial.RUNNING:
        return "running"
    return "failed" if trial.status == Trial.ERROR else "waiting"


def _strength(base: TrainConfig, knobs: Mapping[str, Any]) -> tuple[float, float]:
    """guidance_strength of the first control and kl_coef of a trial."""
    ours = {path: value for path, value in knobs.items() if path == "kl_coef" or path.endswith(".guidance_strength")}
    config = override(base, ours)
    return next(iter(config.controls.values())).guidance_strength, config.kl_coef


def _error(trial: Trial, folder: Path) -> str:
    """One line: what the trial wrote down, else (its process died) the end of what Ray Tune knows."""
    own = folder / ERROR_FILE
    if own.is_file():
        return own.read_text(encoding="utf-8").strip()
    known = Path(trial.error_file) if trial.error_file else None
    lines = known.read_text(encoding="utf-8").strip().splitlines() if known is not None and known.is_file() else []
    return lines[-1] if lines else "its process died"
