"""What lies around an adapter: the run that made it knows its prompts and its classifiers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ctrl_ray.config.json import read_train_config
from ctrl_ray.embedded import is_embedded
from ctrl_ray.errors import ConfigError, CtrlRayError
from ctrl_ray.offline.prompts import read_prompts, training_prompts
from ctrl_ray.offline.shapes import PROMPTS
from ctrl_ray.runs.copies import CLASSIFIER


def run_prompts(adapter: str | Path, base_model: str) -> tuple[str, ...]:
    """Evaluation prompts of the run that holds the adapter (RUN/config.json), else those of the shapes.

    ConfigError when there is no such run and the base model is not the shapes pipeline.
    """
    file = Path(adapter).resolve().parent / "config.json"
    return _evaluation_prompts(file) or prompts_of_base(base_model, f"{file} does not exist")


def classifier_prompts(classifiers: Iterable[str | Path], base_model: str) -> tuple[str, ...]:
    """Evaluation prompts of the run that fitted one of these classifiers (RUN/classifier/NAME), else those of the shapes.

    ConfigError when there is no such run and the base model is not the shapes pipeline.
    """
    runs = [Path(folder).resolve().parent.parent for folder in classifiers]
    found = (_evaluation_prompts(run / "config.json") for run in runs)
    return next((prompts for prompts in found if prompts), ()) or prompts_of_base(base_model)


def _evaluation_prompts(file: Path) -> tuple[str, ...]:
    """Of the run with this config.json; none where it is not there."""
    if not file.is_file():
        return ()
    config = read_train_config(file)
    own = config.evaluation.prompts_file
    return read_prompts(own, config.encoding) if own else training_prompts(config)


def first_prompt(adapter: str | Path, base_model: str) -> str:
    """The first of `run_prompts`, for an example; '' where they are not known, or no longer there."""
    try:
        return run_prompts(adapter, base_model)[0]
    except CtrlRayError:
        return ""


def prompts_of_base(base_model: str, why: str = "no run says what it was evaluated on") -> tuple[str, ...]:
    """Those of the shapes, where the base model is theirs; else ConfigError."""
    if not is_embedded(base_model):
        raise ConfigError(f"{why}, so the prompts to evaluate on are unknown; give --prompts-file")
    return PROMPTS


def find_classifiers(adapter: str | Path, controls: Sequence[str], given: Mapping[str, str | Path]) -> dict[str, Path]:
    """Classifier folder of the controls that have one: the given one, else the copy that travels with the adapter
    (ADAPTER/classifier/NAME), else RUN/classifier/NAME beside it."""
    folders: dict[str, Path] = {}
    for name in controls:
        known = (Path(adapter) / CLASSIFIER / name, Path(adapter).parent / CLASSIFIER / name)
        places = [Path(given[name])] if name in given else [place for place in known if place.is_dir()]
        if places:
            folders[name] = places[0].resolve()
    return folders


def run_classifiers(adapter: str | Path, controls: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Classifier folder of every control, as `find_classifiers` looks for it.

    ConfigError when one is missing, or one is given for a control that the adapter does not have.
    """
    unknown = sorted(set(given) - set(controls))
    if unknown:
        raise ConfigError(f"--classifier names {unknown}; the adapter has the controls {list(controls)}")
    folders = find_classifiers(adapter, controls, given)
    for name in controls:
        place = folders.get(name, Path(adapter).resolve() / CLASSIFIER / name)
        if not place.is_dir():
            raise ConfigError(
                f"no classifier of control {name!r} at {place}; its belief is compared with the truth. "
                f"Give --classifier {name}=FOLDER, or judge images alone: python -m ctrl_ray.sample, then --images"
            )
    return {name: str(folder) for name, folder in folders.items()}
