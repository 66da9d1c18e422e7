"""Which data and which files the embedded example's name stands for."""

from __future__ import annotations

import pytest

from ctrl_ray import embedded


@pytest.mark.parametrize(
    ("data", "base_model", "meant"),
    [
        (None, "shapes", "shapes"),
        (None, "shapes-flow", "shapes"),
        (None, "/models/sd", None),
        ("data.parquet", "shapes", "data.parquet"),
        ("shapes", "/models/sd", "shapes"),
    ],
)
def test_the_embedded_model_brings_its_data_unless_others_are_given(
    data: str | None, base_model: str, meant: str | None
) -> None:
    assert embedded.data_or_embedded(data, base_model) == meant


def test_the_names_are_these_and_their_files_are_there() -> None:
    assert all(map(embedded.is_embedded, ("shapes", "shapes-flow")))
    assert not any(map(embedded.is_embedded, ("shapes-exact", "./shapes", None)))
    assert all((folder / "model_index.json").is_file() for folder in embedded.PIPELINES.values())
    assert (embedded.CLASSIFIER / "classifier.json").is_file()
    assert (embedded.RECOGNISER / "config.json").is_file()
