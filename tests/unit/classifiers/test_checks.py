"""What is refused before Ray starts, from footers and the control's column."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ctrl_ray.classifiers.checks import check_fit, prompt_doubts
from ctrl_ray.classifiers.examples import read_rows
from ctrl_ray.config import ClassifierConfig, ControlConfig, TrainConfig
from ctrl_ray.errors import ConfigError, CtrlRayError, DataError

STARS = ControlConfig(classes=("bad", "good"))
SIZE = ControlConfig(thresholds=(40000.0, 60000.0))


def config(pipeline: Path, data: Path, spec: ControlConfig, **classifier: Any) -> TrainConfig:
    return TrainConfig(
        base_model=str(pipeline), data=str(data), controls={"mine": spec}, classifier=ClassifierConfig(**classifier)
    )


def parquet(path: Path, values: list[Any], **columns: list[Any]) -> Path:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    pq.write_table(pa.table({"image": [buffer.getvalue()] * len(values), "mine": values, **columns}), path)
    return path


@pytest.mark.parametrize(
    ("spec", "values", "message"),
    [
        (SIZE, [1000.0, 1079.0, 1040.0], "between 1000 and 1079, and all 3 rows are of class '<40000'"),
        (SIZE, [70000, 80000], "all 2 rows are of class '>=60000'"),
        (STARS, [1, 1, 1, 1], "all 4 rows are of class 'good'"),
    ],
)
def test_data_of_one_class_are_refused(
    tiny_pipeline: Path, tmp_path: Path, spec: ControlConfig, values: list[Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        check_fit(config(tiny_pipeline, parquet(tmp_path / "data.parquet", values), spec), "mine")


def test_only_the_rows_that_the_fit_takes_count(tiny_pipeline: Path, tmp_path: Path) -> None:
    data = parquet(tmp_path / "data.parquet", [0, 0, 0, 1])
    check_fit(config(tiny_pipeline, data, STARS), "mine")
    with pytest.raises(DataError, match="all 3 rows are of class 'bad'"):
        check_fit(config(tiny_pipeline, data, STARS, max_images=3), "mine")


def test_labels_that_are_none_are_left_to_the_reader_which_names_the_row(tiny_pipeline: Path, tmp_path: Path) -> None:
    """Stars 1 and 2 for two classes: the fault is the 2, not that all others are of one class."""
    check_fit(config(tiny_pipeline, parquet(tmp_path / "data.parquet", [1, 2, 1, 2]), STARS), "mine")


def test_a_classifier_that_is_given_prompts_needs_them(tiny_pipeline: Path, tmp_path: Path) -> None:
    data = parquet(tmp_path / "data.parquet", [0, 1], text=["a cat", "a dog"])
    with pytest.raises(CtrlRayError, match=r"'prompt'.*'text'"):
        check_fit(config(tiny_pipeline, data, STARS, prompt_conditional=True), "mine")
    check_fit(config(tiny_pipeline, data, STARS), "mine")
    with_prompts = parquet(tmp_path / "prompts.parquet", [0, 1], prompt=["a cat", "a dog"])
    check_fit(config(tiny_pipeline, with_prompts, STARS, prompt_conditional=True), "mine")


def test_pipeline_samples_need_an_oracle_and_a_sampler(tiny_pipeline: Path, tmp_path: Path) -> None:
    data = parquet(tmp_path / "data.parquet", [0, 1])
    with pytest.raises(ConfigError, match="no oracle to label them"):
        check_fit(config(tiny_pipeline, data, STARS, num_pipeline_samples=5), "mine", has_sampler=True)
    measured = ControlConfig(thresholds=(700.0,), oracle="jpeg_size")
    with pytest.raises(ConfigError, match="there is no sample_pipeline"):
        check_fit(config(tiny_pipeline, data, measured, num_pipeline_samples=5), "mine")
    check_fit(config(tiny_pipeline, data, measured, num_pipeline_samples=5), "mine", has_sampler=True)


BY_PROMPT = ControlConfig(oracle="tests.prompt_rules:jpeg_size_by_prompt", thresholds=(3000.0,))


def test_an_oracle_that_is_told_prompts_needs_them(tiny_pipeline: Path, tmp_path: Path) -> None:
    data = parquet(tmp_path / "data.parquet", [0, 1])
    with pytest.raises(DataError, match=r"jpeg_size_by_prompt' judges an image with its prompt.*column 'prompt'"):
        check_fit(config(tiny_pipeline, data, BY_PROMPT), "mine")
    with_prompts = parquet(tmp_path / "prompts.parquet", [0, 1], prompt=["a cat mild", "a dog strict"])
    check_fit(config(tiny_pipeline, with_prompts, BY_PROMPT), "mine")
    blind = config(tiny_pipeline, with_prompts, BY_PROMPT, ignore_prompts=True)
    for ask in (lambda: check_fit(blind, "mine"), lambda: read_rows(blind, ["mine"], (8, 8))):
        with pytest.raises(
            ConfigError, match=r"judges an image with its prompt, and classifier\.ignore_prompts leaves"
        ):
            ask()


def test_a_classifier_that_is_blind_to_what_its_oracle_sees_is_doubted() -> None:
    (doubt,) = prompt_doubts(BY_PROMPT, sees_prompt=False)
    assert "does not see the prompt" in doubt and "--classifier.prompt-conditional" in doubt
    assert prompt_doubts(BY_PROMPT, sees_prompt=True) == []
    assert prompt_doubts(STARS, sees_prompt=False) == [] == prompt_doubts(SIZE, sees_prompt=False)
