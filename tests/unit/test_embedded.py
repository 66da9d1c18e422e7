"""Which data and which files the embedded example's name stands for."""

from __future__ import annotations

import pytest

from ctrl_ray import embedded


@pytest.mark.parametrize(
    ("data", "base_model", "meant"),
    [
        (None, "shapes", "shapes"),
        (None, "/models/sd", None),
        ("data.parquet", "shapes", "data.parquet"),
        ("shapes", "/models/sd", "shapes"),
    ],
)
def test_the_embedded_model_brings_its_data_unless_others_are_given(
    data: str | None, base_model: str, meant: str | None
) -> None:
    assert embedded.data_or_embedded(data, base_model) == meant


def test_the_name_is_one_name_and_its_files_are_there() -> None:
    assert embedded.is_embedded("shapes") and not embedded.is_embedded("./shapes") and not embedded.is_embedded(None)
    assert (embedded.PIPELINE / "model_index.json").is_file()
    assert (embedded.CLASSIFIER / "classifier.json").is_file()
    assert (embedded.RECOGNISER / "config.json").is_file()
