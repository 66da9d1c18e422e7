"""Where a run's prompts come from."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrl_ray.config import ClassifierConfig, TrainConfig
from ctrl_ray.errors import ConfigError
from ctrl_ray.offline.prompts import NO_PROMPT, sampling_prompts, training_prompts
from ctrl_ray.offline.shapes import PROMPTS


@pytest.mark.parametrize(
    ("columns", "expected"),
    [({}, NO_PROMPT), ({"prompt": ["", ""]}, NO_PROMPT), ({"prompt": ["a cat", ""]}, ("a cat",))],
)
def test_data_without_prompts_are_those_of_the_empty_one(
    columns: dict[str, list[str]], expected: tuple[str, ...], tmp_path: Path
) -> None:
    """A file of prompts goes before; stage 1 says that it draws with the empty prompt."""
    file = tmp_path / "data.parquet"
    pq.write_table(pa.table({"image": [b"1", b"2"], **columns}), file)
    config = TrainConfig(data=str(file), classifier=ClassifierConfig(num_pipeline_samples=7))
    assert training_prompts(config) == expected
    prompts, note = sampling_prompts(config)
    assert prompts == expected and (note is not None) == (expected == NO_PROMPT)
    assert note is None or (note.startswith(f"{file} has no prompts: the 7 samples") and "--prompts-file" in note)
    (tmp_path / "prompts.txt").write_text("a dog\n")
    told = TrainConfig(data=str(file), prompts_file=str(tmp_path / "prompts.txt"))
    assert training_prompts(told) == ("a dog",) and sampling_prompts(told) == (("a dog",), None)


def test_the_example_has_prompts_and_nothing_has_none() -> None:
    assert training_prompts(TrainConfig(data="shapes")) == PROMPTS
    with pytest.raises(ConfigError, match=r"neither prompts_file nor data is set; give --prompts-file"):
        training_prompts(TrainConfig(data=None, base_model="/some/model"))
