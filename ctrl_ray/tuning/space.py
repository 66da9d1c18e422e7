"""What a sweep varies: a file with PRESET, METRIC, MODE and space(), or the same in Python; checked before Ray starts."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ray.tune.search.sample import Domain, Function

from ctrl_ray.config import TrainConfig
from ctrl_ray.config.json import read_train_config
from ctrl_ray.config.overrides import nearest, override, setting_paths
from ctrl_ray.config.presets import DEFAULT_PRESET, preset
from ctrl_ray.errors import ConfigError
from ctrl_ray.evaluation.metric_names import EVALUATION_METRICS
from ctrl_ray.ray_internals import longest_time_of

METRICS = (*(name for name in EVALUATION_METRICS if name != "num_samples"), "gap")
"""What every trial logs at its end."""
EARLY_METRICS = ("accuracy", "kl", "gap")
"""What a trial logs at every evaluation on its way: what a scheduler can stop it by."""
SHARED = (
    *("output_dir", "base_model", "base_revision", "data", "num_drawn_images", "classifier", "rewards", "scaling"),
    *("tracker", "evaluation", "full_finetune"),
)
"""Settings that all trials have in common, which share classifiers, reward pool, machines and the way they are judged."""
_SHARED_OF_CONTROLS = ("oracle", "thresholds", "classes", "unit", "column", "classifier")
_NAMES = ("PRESET", "METRIC", "MODE", "space", "points", "scheduler", "search")
_BY_ORACLE = ("accuracy", "joint_accuracy", "macro_f1", "belief_gap")
_DRAWS = 16


@dataclass(frozen=True, kw_only=True)
class Space:
    """What a sweep varies and what it looks for; a sweep file says the same.

    from ray import tune
    values = {"kl_coef": tune.loguniform(0.5, 2.0), "controls.jpeg_size.guidance_strength": tune.uniform(1.0, 6.0)}
    space = Space(name="mine", values=values, metric=("accuracy",), mode=("max",))
    """

    name: str
    values: Mapping[str, Any]
    """Dotted path of a setting → a Ray Tune distribution or grid. A plain value is the same for all trials."""
    metric: tuple[str, ...] = ("accuracy",)
    """What makes a trial good. The first one chooses the best trial; more than one need a `search` that knows them. "gap",
    with mode "min", is the distance to a trial's own target: it compares trials of equal guidance_strength / kl_coef, such as
    those of a sweep over learning rates; over the exponent itself it would choose the weakest."""
    mode: tuple[str, ...] = ("max",)
    """"max" or "min" for each metric."""
    preset: str = DEFAULT_PRESET
    """Name of a preset, or path of a run's config.json."""
    points: tuple[Mapping[str, Any], ...] = ()
    """Trials to run before any drawn ones. Settings that a point leaves out are drawn."""
    scheduler: Callable[[], Any] | None = None
    """Makes a Ray Tune scheduler, such as ASHA over `updates_done`."""
    search: Callable[..., Any] | None = None
    """search(metric, mode, points) makes a Ray Tune searcher; None: random and grid search."""
    source: str = field(default="", repr=False)
    """Text of the file, kept beside the results; '' for a space made in Python."""

    @property
    def constants(self) -> dict[str, Any]:
        """What is the same for all trials."""
        return {path: value for path, value in self.values.items() if not _varies(value)}

    @property
    def knobs(self) -> dict[str, Any]:
        """What differs between trials."""
        return {path: value for path, value in self.values.items() if _varies(value)}

    @property
    def grid_size(self) -> int:
        """Trials of one pass over all grids."""
        sizes = [len(value["grid_search"]) for value in self.knobs.values() if isinstance(value, dict)]
        return int(np.prod(sizes)) if sizes else 1


def load_space(source: str | Path | Space) -> Space:
    """The space of a file; ConfigError names what is missing, unknown or of the wrong kind."""
    if isinstance(source, Space):
        return source
    file = Path(source).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"sweep file {file} does not exist; expected a Python file such as tune_spaces/kl_guidance.py"
        )
    try:
        names = runpy.run_path(str(file))
    except Exception as error:
        raise ConfigError(f"sweep file {file} cannot be read ({type(error).__name__}: {error})") from error
    for name in ("METRIC", "MODE", "space"):
        if name not in names:
            raise ConfigError(
                f"sweep file {file} lacks {name}; expected {', '.join(_NAMES)}; METRIC, MODE and space must be there"
            )
    for name in ("space", "points", "scheduler", "search"):
        if name in names and not callable(names[name]):
            raise ConfigError(f"sweep file {file}: {name} is {names[name]!r}; expected a function")
    values = names["space"]()
    if not isinstance(values, dict):
        raise ConfigError(f"sweep file {file}: space() gives {type(values).__name__}; expected a dict of dotted paths")
    return Space(
        name=file.stem,
        values=values,
        metric=_tuple(names["METRIC"]),
        mode=_tuple(names["MODE"]),
        preset=_preset(names.get("PRESET", DEFAULT_PRESET), file),
        points=tuple(names["points"]()) if "points" in names else (),
        scheduler=names.get("scheduler"),
        search=names.get("search"),
        source=file.read_text(encoding="utf-8"),
    )


def check_space(space: Space, base: TrainConfig) -> TrainConfig:
    """The config that all trials start from: `base` with the space's constants.

    ConfigError for a setting that does not exist or that all trials share, a value that a trial's config would refuse
    (every value of a grid, the ends of a range, some draws), and a metric that no trial logs.
    """
    _check_metric(space)
    known = setting_paths(base)
    for path in space.knobs:
        if path not in known:
            raise ConfigError(f"sweep {space.name}: setting {path!r} does not exist{nearest(path, known)}")
        if is_shared(path):
            raise ConfigError(
                f"sweep {space.name}: {path} cannot differ between trials, which share classifiers, reward pool and machines; "
                "give it one value, or run a sweep for each"
            )
    if "output_dir" in space.constants:
        raise ConfigError(f"sweep {space.name}: output_dir is not a setting of the space; give --output-dir")
    base = override(base, space.constants)
    _check_judged(space, base)
    if not space.knobs:
        raise ConfigError(
            f"sweep {space.name}: nothing varies; give at least one setting a distribution, such as tune.uniform"
        )
    if base.evaluation.asynchronous:
        raise ConfigError(
            f"sweep {space.name}: evaluation.asynchronous is not for sweeps, which read an evaluation with its checkpoint"
        )
    for point in space.points:
        unknown = [path for path in point if path not in space.knobs]
        if unknown:
            raise ConfigError(
                f"sweep {space.name}: points() sets {unknown[0]!r}, which does not vary{nearest(unknown[0], space.knobs)}"
            )
        override(base, point)
        odd = [path for path, value in point.items() if isinstance(value, list | tuple | dict)]
        if odd and space.search is None:
            raise ConfigError(
                f"sweep {space.name}: points() sets {odd[0]} to {point[odd[0]]!r}, but Ray Tune takes single values there; "
                "use tune.grid_search for it, and leave it out of the points"
            )
    for path, entry in space.knobs.items():
        for value in some_values(entry):
            override(base, {path: value})
    _check_scheduler(space, base)
    return base


def base_of(space: Space) -> TrainConfig:
    """The config of the space's PRESET."""
    if not space.preset.endswith(".json"):
        return preset(space.preset)
    file = Path(space.preset).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"sweep {space.name}: PRESET {space.preset} does not exist; give a preset or a run's config.json"
        )
    return read_train_config(file)


def check_request(num_samples: int | None, max_concurrent: int | str) -> None:
    """ConfigError for numbers that make no sweep."""
    if num_samples is not None and num_samples < 1:
        raise ConfigError(f"num_samples is {num_samples}; expected at least 1")
    if max_concurrent != "auto" and (not isinstance(max_concurrent, int) or max_concurrent < 1):
        raise ConfigError(f"max_concurrent is {max_concurrent!r}; expected 'auto' or at least 1")


def is_shared(path: str) -> bool:
    """Whether all trials must have the same value."""
    first, last = path.split(".")[0], path.rpartition(".")[2]
    return first in SHARED or (first == "controls" and last in _SHARED_OF_CONTROLS)


def some_values(entry: Any) -> list[Any]:
    """Every value of a grid or choice; both ends of a range and some draws from it; none of what depends on others."""
    if isinstance(entry, dict):
        return list(entry["grid_search"])
    if isinstance(entry, Function):
        return []
    if hasattr(entry, "categories"):
        return list(entry.categories)
    draws = [entry.sample(random_state=np.random.default_rng(seed)) for seed in range(_DRAWS)]
    low, high = getattr(entry, "lower", None), getattr(entry, "upper", None)
    whole = all(isinstance(value, int | np.integer) for value in draws)
    ends = [low, None if high is None else high - 1 if whole else high]  # the upper end of a range of integers is open
    return draws + [type(draws[0])(end) for end in ends if end is not None and np.isfinite(end)]


def _check_metric(space: Space) -> None:
    known = METRICS if not (space.scheduler or (space.search and len(space.metric) == 1)) else EARLY_METRICS
    for metric in space.metric:
        if metric not in METRICS:
            raise ConfigError(f"sweep {space.name}: METRIC {metric!r} is logged by no trial{nearest(metric, METRICS)}")
        if metric not in known:
            raise ConfigError(
                f"sweep {space.name}: METRIC {metric!r} is measured at a trial's end only, so that no scheduler or search can "
                f"follow it; use one of {', '.join(EARLY_METRICS)}, or leave them out"
            )
    if len(space.mode) != len(space.metric) or not set(space.mode) <= {"max", "min"}:
        raise ConfigError(
            f"sweep {space.name}: MODE is {space.mode}; expected 'max' or 'min' for each of {space.metric}"
        )
    if len(space.metric) > 1 and space.scheduler:
        raise ConfigError(f"sweep {space.name}: a scheduler knows one goal, but METRIC is {space.metric}; leave it out")
    if len(space.metric) > 1 and not space.search:
        raise ConfigError(
            f"sweep {space.name}: METRIC {space.metric} needs a search(metric, mode, points) that knows several"
        )


def _check_judged(space: Space, base: TrainConfig) -> None:
    """Accuracy and its kin exist only where something measures the truth; the gap only where there is a target."""
    if "gap" in space.metric and base.latent_reduction == "mean":
        raise ConfigError(
            f"sweep {space.name}: METRIC 'gap' is logged by no trial, because with latent_reduction 'mean' there is no target "
            "to be away from; set latent_reduction to 'sum', or use another metric"
        )
    without = [name for name, control in base.controls.items() if control.oracle is None and control.classifier is None]
    judged = [metric for metric in space.metric if metric in _BY_ORACLE]
    if judged and without and len(without) == len(base.controls):
        raise ConfigError(
            f"sweep {space.name}: METRIC {judged[0]!r} is logged by no trial, because no control ({', '.join(without)}) has an "
            "oracle; give one, or use kl"
        )


def _check_scheduler(space: Space, base: TrainConfig) -> None:
    if space.scheduler is None:
        return
    most = longest_time_of(space.scheduler())
    if most is not None and most <= base.num_updates:
        raise ConfigError(
            f"sweep {space.name}: its scheduler ends every trial at max_t = {most:g}, before the evaluation after "
            f"num_updates = {base.num_updates}; make max_t larger"
        )


def _preset(name: Any, file: Path) -> str:
    """As it stands; the path of a config.json is meant from the sweep file's folder."""
    if not isinstance(name, str):
        raise ConfigError(
            f"sweep file {file}: PRESET is {name!r}; expected the name of a preset or a run's config.json"
        )
    return str(file.resolve().parent / Path(name).expanduser()) if name.endswith(".json") else name


def _varies(value: Any) -> bool:
    return isinstance(value, Domain) or (isinstance(value, dict) and set(value) == {"grid_search"})


def _tuple(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)
