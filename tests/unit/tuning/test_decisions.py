"""What a sweep decides with no cluster: room for trials, names, folders, and when a table is drawn."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ray import tune

from ctrl_ray.config import ControlConfig, ScalingConfig, TrainConfig
from ctrl_ray.config.overrides import override
from ctrl_ray.config.presets import preset
from ctrl_ray.errors import ConfigError, RunFolderError
from ctrl_ray.tuning.concurrency import concurrent_trials, trial_bundles
from ctrl_ray.tuning.live_table import LiveTable
from ctrl_ray.tuning.space import Space
from ctrl_ray.tuning.sweep_folder import SweepFolder
from ctrl_ray.tuning.trial import SESSION_FILE, begin_session, seconds_before, trial_folder, trial_name

SPACE = Space(name="mine", values={"kl_coef": tune.uniform(1, 2)}, source="# a file")


@pytest.mark.parametrize(
    ("free", "bundles", "expected"),
    [
        ([{"CPU": 1.0}], [{"CPU": 1.0}], 1),
        ([{"CPU": 7.0}], [{"CPU": 2.0}] * 2, 1),  # 4 of 7; the 3 that are left hold one worker of two
        ([{"CPU": 3.0}, {"CPU": 3.0}], [{"CPU": 2.0}] * 2, 1),  # 6 CPUs, but each node holds one worker only
        ([{"CPU": 8.0, "GPU": 4.0}, {"CPU": 64.0}], [{"CPU": 2.0, "GPU": 1.0}] * 2, 2),
        ([{"CPU": 0.5}], [{"CPU": 1.0}], 0),
        ([{"CPU": 0.3}], [{"CPU": 0.1}], 3),  # not 2 by rounding
    ],
)
def test_trials_that_have_room(free: list, bundles: list, expected: int) -> None:
    assert concurrent_trials(free, bundles) == expected
    assert sum(node["CPU"] for node in free) > 0  # what is given is not used up


def test_an_elastic_trial_needs_its_fewest_workers() -> None:
    scaling = ScalingConfig(num_workers=4, min_workers=2, cpus_per_worker=1.5)
    config = TrainConfig(scaling=scaling, micro_batch_size_per_worker=16)
    assert trial_bundles(config) == [{"CPU": 1.5}] * 2


def test_override_replaces_what_belongs_together() -> None:
    base = TrainConfig(controls={"jpeg_size": ControlConfig(thresholds=(1.0, 2.0))})
    changed = override(
        base,
        {
            "controls.jpeg_size.guidance_strength": np.float64(3),
            "global_batch_size": 96,
            "micro_batch_size_per_worker": 48,  # either of the two alone would not divide
            "lora.target_modules": ["to_q"],
        },
    )
    assert changed.controls["jpeg_size"].guidance_strength == 3.0
    assert (changed.global_batch_size, changed.micro_batch_size_per_worker) == (96, 48)
    assert changed.lora.target_modules == ("to_q",)
    for path, value in (("seed", True), ("aim", 1), ("estimator.name", "ful"), ("prompts_file", 3)):
        with pytest.raises(ConfigError, match=f"{path} is .*; expected"):
            override(base, {path: value})


def test_a_trial_is_called_by_its_number(tmp_path: Path) -> None:
    assert trial_name("a1b2c_00003") == "00003"
    assert trial_name("8f3e21aa") == "8f3e21aa"
    assert trial_folder(tmp_path, "a1b2c_00003").local == tmp_path / "trials" / "00003"


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


def test_a_log_gets_a_table_when_something_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    table = LiveTable(log_every_s=1000)
    for text, now in (("a 0.1", False), ("a 0.2", False), ("a 0.3", True), ("a 0.3", True)):
        table.show(text, now=now)
    assert out.getvalue() == "a 0.1\n\na 0.3\n\n"


def test_a_terminal_s_table_is_redrawn_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("COLUMNS", "5")
    table = LiveTable(every_s=0)
    table.show("one\nlong line")
    table.show("two")
    assert out.getvalue() == "one\nlong\n" + "\x1b[2F\x1b[J" + "two\n"


def test_a_trials_sessions_count_until_the_last_row_that_each_logged(tmp_path: Path) -> None:
    assert seconds_before(tmp_path) == begin_session(tmp_path) == 0
    (tmp_path / SESSION_FILE).write_text(json.dumps({"started": time.time() - 1000, "seconds_before": 7.0}))
    assert begin_session(tmp_path) == 7  # killed before it logged anything
    (tmp_path / "metrics.jsonl").touch()
    started = time.time() - 1000
    (tmp_path / SESSION_FILE).write_text(json.dumps({"started": started, "seconds_before": 7.0}))
    os.utime(tmp_path / "metrics.jsonl", (started + 60, started + 60))
    assert begin_session(tmp_path) == seconds_before(tmp_path) == pytest.approx(67, abs=1e-3)
    # killed at once: the rows are those of the session before
    assert begin_session(tmp_path) == pytest.approx(67, abs=1e-3)
