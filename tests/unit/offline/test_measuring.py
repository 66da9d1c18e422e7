"""One measuring task, without Ray Data around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pyarrow import fs

from ctrl_ray.errors import ConfigError
from ctrl_ray.offline.labelling import _check_prompts
from ctrl_ray.offline.measuring import Work, _Measure
from ctrl_ray.oracles import jpeg_size

BY_PROMPT = {"size": "jpeg_size", "rule": "tests.prompt_rules:jpeg_size_by_prompt"}


def _measured(items: list[dict[str, Any]], *, sidecar: bool) -> list[dict[str, Any]]:
    work = Work(
        filesystem=fs.LocalFileSystem(),
        oracles=BY_PROMPT,
        image_size=None,
        sidecar=sidecar,
        encoding="utf-8",
        search_path=str(Path.cwd()),
    )
    columns = {key: np.array([item[key] for item in items], dtype=object) for key in items[0]}
    (table,) = _Measure(work)(columns)
    return table.to_pylist()


@pytest.mark.parametrize("sidecar", [True, False])
def test_an_oracle_is_told_the_prompt_of_its_image(tmp_path: Path, sidecar: bool) -> None:
    """Beside the image or from a table; 400 bytes less or more are those of the prompts' last words."""
    rng = np.random.default_rng(0)
    items, sizes = [], []
    for row, prompt in enumerate(("a red circle strict", "a blue cross mild")):
        image = Image.fromarray(rng.integers(0, 255, (16, 16, 3)).astype(np.uint8))
        image.save(tmp_path / f"{row}.png")
        sizes.append(jpeg_size(image))
        item: dict[str, Any] = {"file": str(tmp_path / f"{row}.png"), "row": row, "known": "{}"}
        if sidecar:
            (tmp_path / f"{row}.txt").write_text(prompt)
        else:
            item["prompt"] = prompt
        items.append(item)
    rows = _measured(items, sidecar=sidecar)
    assert [row["reason"] for row in rows] == ["", ""]
    numbers = [json.loads(row["numbers"]) for row in rows]
    assert [each["size"] for each in numbers] == sizes
    assert [each["rule"] - each["size"] for each in numbers] == [-400.0, 400.0]


def test_an_oracle_that_asks_for_prompts_is_refused_without_them() -> None:
    with pytest.raises(
        ConfigError, match=r"'tests\.prompt_rules:jpeg_size_by_prompt' judges.*no prompts are given.*sidecar"
    ):
        _check_prompts(BY_PROMPT, has_prompts=False)
    _check_prompts(BY_PROMPT, has_prompts=True)
    _check_prompts({"size": "jpeg_size"}, has_prompts=False)
