"""What a sweep's folder holds, and what may resume it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from ray import tune

from ctrl_ray.config.presets import preset
from ctrl_ray.errors import ConfigError, RunFolderError
from ctrl_ray.tuning.space import Space
from ctrl_ray.tuning.sweep_folder import SweepFolder

SPACE = Space(name="mine", values={"kl_coef": tune.uniform(1, 2)}, source="# a file")


def test_a_sweep_is_resumed_with_what_it_was_begun_with(tmp_path: Path) -> None:
    folder, base = SweepFolder.at(str(tmp_path / "sweep")), preset("shapes")
    with pytest.raises(RunFolderError, match="holds no sweep to resume"):
        folder.prepare(SPACE, base, None, resume=True)
    assert folder.prepare(SPACE, base, 5, resume=False) == 5
    assert folder.prepare(SPACE, base, None, resume=True) == 5
    with pytest.raises(RunFolderError, match=r"already holds a sweep; give another --output-dir, or .*--resume"):
        folder.prepare(SPACE, base, 5, resume=False)
    for changed, message in (
        ((SPACE, base, 6), "num_samples: 5 → 6"),
        ((SPACE, dataclasses.replace(base, seed=1), None), "seed: 0 → 1"),
        ((dataclasses.replace(SPACE, metric=("kl",)), base, None), r"metric: \['accuracy'\] → \['kl'\]"),
        ((dataclasses.replace(SPACE, source="# another"), base, None), "the sweep file differs from .*space.py"),
    ):
        with pytest.raises(ConfigError, match=message):
            folder.prepare(*changed, resume=True)
    with pytest.raises(ConfigError, match="expected a folder"):
        SweepFolder.at("s3://bucket/sweep")
