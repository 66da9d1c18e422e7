"""What lies around an adapter: the run that made it knows its prompts and its classifiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ctrl_ray.config.json import train_config_from_json
from ctrl_ray.embedded import is_embedded
from ctrl_ray.errors import ConfigError
from ctrl_ray.offline.prompts import read_prompts, training_prompts
from ctrl_ray.offline.shapes import PROMPTS


def run_prompts(adapter: str | Path, base_model: str) -> tuple[str, ...]:
    """Evaluation prompts of the run that holds the adapter (RUN/config.json), else those of the shapes.

    ConfigError when there is no such run and the base model is not the shapes pipeline.
    """
    file = Path(adapter).resolve().parent / "config.json"
    if file.is_file():
        config = train_config_from_json(file.read_text(encoding="utf-8"), source=str(file))
        own = config.evaluation.prompts_file
        return read_prompts(own) if own else training_prompts(config)
    if not is_embedded(base_model):
        raise ConfigError(f"{file} does not exist, so the prompts to evaluate on are unknown; give --prompts-file")
    return PROMPTS


def run_classifiers(adapter: str | Path, controls: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Classifier folder of every control: the given one, else RUN/classifier/NAME beside the adapter.

    ConfigError when one is missing, or one is given for a control that the adapter does not have.
    """
    folders = {name: Path(given.get(name, Path(adapter).parent / "classifier" / name)).resolve() for name in controls}
    unknown = sorted(set(given) - set(controls))
    if unknown:
        raise ConfigError(f"--classifier names {unknown}; the adapter has the controls {list(controls)}")
    missing = [name for name, folder in folders.items() if not folder.is_dir()]
    if missing:
        raise ConfigError(
            f"no classifier of control {missing[0]!r} at {folders[missing[0]]}; its belief is compared with the truth. "
            f"Give --classifier {missing[0]}=FOLDER, or judge images alone: python -m ctrl_ray.sample, then --images"
        )
    return {name: str(folder) for name, folder in folders.items()}


def named_folders(arguments: Sequence[str]) -> dict[str, str]:
    """The folders of `--classifier NAME=FOLDER …`; ConfigError for one without a name or a folder."""
    folders = {}
    for text in arguments:
        name, _, folder = text.partition("=")
        if not name or not folder:
            raise ConfigError(
                f"--classifier {text!r} is not NAME=FOLDER; e.g. --classifier jpeg_size=RUN/classifier/jpeg_size"
            )
        folders[name] = folder
    return folders
