"""Prompts of a run: a file of them, the data set's column, or the drawn example's."""

from __future__ import annotations

from pathlib import Path

from ctrl_ray.config import TrainConfig
from ctrl_ray.embedded import data_or_embedded, is_embedded
from ctrl_ray.errors import ConfigError
from ctrl_ray.offline.reading import has_prompts_column, read_prompts_column
from ctrl_ray.offline.shapes import PROMPTS
from ctrl_ray.offline.text import UTF_8, lines_of, read_text
from ctrl_ray.wording import no_file

NO_PROMPT = ("",)
"""The prompts of a run on data that have none."""


def read_prompts(path: str | Path, encoding: str = UTF_8) -> tuple[str, ...]:
    """The non-empty lines of a prompts file; a missing or empty file is a `ConfigError`, one that is no text a `DataError`."""
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"prompts file {file} {no_file(file)}; expected a text file with one prompt a line")
    prompts = tuple(line.strip() for line in lines_of(read_text(file, encoding)) if line.strip())
    if not prompts:
        raise ConfigError(f"prompts file {file} holds no prompt; expected one a line")
    return prompts


def training_prompts(config: TrainConfig) -> tuple[str, ...]:
    """Prompts of the file, else of the data set's column, else the shapes prompts; of a data set without any the empty one.

    The empty prompt, which a pipeline with classifier-free guidance was trained for by dropping prompts, is its law over all
    of them, p_pre(x) = Σ_c p(c) p_pre(x|c). Raises ConfigError where there is neither a file nor data.
    """
    if config.prompts_file:
        return read_prompts(config.prompts_file, config.encoding)
    data = data_or_embedded(config.data, config.base_model)
    if is_embedded(data):
        return PROMPTS
    if data is None:
        raise ConfigError(
            "there are no prompts to train on: neither prompts_file nor data is set; give --prompts-file with one prompt a line"
        )
    column = read_prompts_column(data) if has_prompts_column(data) else []
    return tuple(prompt for prompt in column if prompt) or NO_PROMPT


def sampling_prompts(config: TrainConfig) -> tuple[tuple[str, ...], str | None]:
    """`training_prompts` to sample the pre-trained pipeline with for stage 1, and a line to say where there are none.

    What a run will ask the classifier about, p_pre(x|c) of its own prompts, is part of what the empty prompt draws.
    """
    prompts, number = training_prompts(config), config.classifier.num_pipeline_samples
    if prompts != NO_PROMPT:
        return prompts, None
    return prompts, (
        f"{config.data} has no prompts: the {number} samples of the pipeline (classifier.num_pipeline_samples) are drawn with "
        "the empty prompt; give --prompts-file to draw them with the prompts you will train on"
    )


def has_prompts(data: str | None) -> bool:
    """Whether any image of the data set has a prompt of its own; those of the drawn example have."""
    if data is None or is_embedded(data):
        return data is not None
    return has_prompts_column(data) and any(read_prompts_column(data))
