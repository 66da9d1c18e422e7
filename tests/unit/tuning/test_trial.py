"""A trial's name, folder and time."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path

import pytest

from ctrl_ray.evaluation.metric_names import EVALUATION_METRICS
from ctrl_ray.tuning.trial import SESSION_FILE, begin_session, numbers_of, seconds_before, trial_folder, trial_name


def test_a_trial_is_called_by_its_number(tmp_path: Path) -> None:
    assert trial_name("a1b2c_00003") == "00003"
    assert trial_name("8f3e21aa") == "8f3e21aa"
    assert trial_folder(tmp_path, "a1b2c_00003").local == tmp_path / "trials" / "00003"


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


def test_a_trials_result_has_what_was_measured_with_its_errors() -> None:
    control = {"accuracy": 0.75, "macro_f1": None, "belief_gap": None, "standard_errors": {"accuracy": 0.02}}
    after = {**dict.fromkeys(EVALUATION_METRICS), "accuracy": 0.75, "kl": 1.5, "controls": {"size": control}}
    after["standard_errors"] = {"accuracy": 0.02, "kl": None, "prompt_fidelity": None}
    expected = {"accuracy": 0.75, "kl": 1.5, "accuracy/size": 0.75, "accuracy_error": 0.02, "accuracy/size_error": 0.02}
    assert numbers_of(after) == expected
    certificate = {"gap": 2.0, "gap_standard_error": 0.25, "pareto_k": math.nan, "too_wide": False}
    gap = {"gap": 2.0, "gap_standard_error": 0.25, "gap_error": 0.25}
    assert numbers_of({**after, **certificate}) == {**expected, **gap}
