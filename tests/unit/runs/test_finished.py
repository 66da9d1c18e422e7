"""What a command line says about a finished run's classifiers."""

from __future__ import annotations

import pytest

from ctrl_ray.errors import ConfigError
from ctrl_ray.runs.finished import named_folders


def test_folders_have_names() -> None:
    """A path may hold the sign itself."""
    assert named_folders(["a=x/y", "b=C=1/z"]) == {"a": "x/y", "b": "C=1/z"}
    assert named_folders([]) == {}


@pytest.mark.parametrize("text", ["folder", "=folder", "name="])
def test_a_folder_without_a_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"--classifier '{text}' is not NAME=FOLDER"):
        named_folders([text])
