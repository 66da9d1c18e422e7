"""The record of a run: what is written, what a resume drops, and that Aim is only a view."""

import json
import socket
import warnings

import numpy as np
import pytest

from ctrl_ray.errors import DataError, RunFolderError
from ctrl_ray.reporting import tracking
from ctrl_ray.reporting.tracking import METRICS_FILE, RunTracker, read_metrics

CONFIG = {"seed": 3, "controls": {"jpeg_size": {"thresholds": (1.0, 2.0), "oracle": None}}}


def _tracker(folder, **options):
    return RunTracker(folder, run_name="test", config=CONFIG, **{"aim": False, **options})


def _five_updates(folder):
    with _tracker(folder) as tracker:
        for update in range(1, 6):
            tracker.log("update", update, {"reward": -1.0 / update})
        tracker.log("evaluation", 5, {"accuracy": 0.5, "accuracy/jpeg_size": np.float64(0.5)})


def test_rows_come_back_and_are_on_disk_at_once(tmp_path):
    with _tracker(tmp_path) as tracker:
        tracker.log("update", 1, {"reward": -0.5, "kl": float("nan")})
        [row] = read_metrics(tmp_path)  # before closing
    assert (row["kind"], row["update"], row["reward"], row["kl"]) == ("update", 1, -0.5, None)
    assert row["time"] > 1e9


def test_resume_drops_later_rows_and_a_torn_last_line(tmp_path):
    _five_updates(tmp_path)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"kind": "update", "update": 6, "rew')
    assert [row["update"] for row in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 5]
    with _tracker(tmp_path, resume_from_update=3) as tracker:
        tracker.log("update", 4, {"reward": 7.0})
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [(row["update"], row["reward"]) for row in rows] == [(1, -1), (2, -0.5), (3, -1 / 3), (4, 7.0)]


def test_a_damaged_line_elsewhere_is_an_error(tmp_path):
    _five_updates(tmp_path)
    lines = (tmp_path / METRICS_FILE).read_text().splitlines()
    (tmp_path / METRICS_FILE).write_text("\n".join([lines[0], lines[1][:9], *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl line 2"):
        _tracker(tmp_path, resume_from_update=3)


def test_a_new_run_does_not_write_over_another(tmp_path):
    _five_updates(tmp_path)
    with pytest.raises(RunFolderError, match="--resume"):
        _tracker(tmp_path)
    assert len(read_metrics(tmp_path)) == 6


def test_undefined_names_and_kinds_fail_and_write_nothing(tmp_path):
    with _tracker(tmp_path) as tracker:
        with pytest.raises(ValueError, match="'rewards' is not defined"):
            tracker.log("update", 1, {"rewards": 1.0})
        with pytest.raises(ValueError, match="kind"):
            tracker.log("training", 1, {"reward": 1.0})
    assert read_metrics(tmp_path) == []
    assert read_metrics(tmp_path / "nowhere") == []


def test_aim_that_fails_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, *_, **__):
            raise RuntimeError("disk full")

    monkeypatch.setattr(tracking, "AimSink", Broken)
    with pytest.warns(RuntimeWarning, match=r"Aim could not open \(RuntimeError: disk full\)"):
        tracker = _tracker(tmp_path, aim=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.log("update", 1, {"reward": 1.0})
        tracker.log_images(1, "samples", [np.zeros((4, 4, 3), np.uint8)], ["a"])
        tracker.close()
    assert read_metrics(tmp_path)[0]["reward"] == 1.0


def test_aim_round_trip_and_resume_without_network_or_home(tmp_path, monkeypatch):
    def refuse(*address):
        raise AssertionError(f"Aim asked for a connection: {address}")

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    run, picture = tmp_path / "run", np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with _tracker(run, aim=True) as tracker:
            for update in (1, 2, 3):
                tracker.log("update", update, {"reward": float(update)})
            tracker.log("evaluation", 3, {"accuracy/jpeg_size": 0.75})
            tracker.log_images(3, "samples", [picture], ["class 0"])
        with _tracker(run, aim=True, resume_from_update=2) as tracker:
            tracker.log("update", 3, {"reward": 30.0})
    assert not [warning for warning in caught if "Aim could not" in str(warning.message)]
    assert list(home.iterdir()) == []

    import aim
    from aim.storage.context import Context

    repo = aim.Repo.from_path(str(run / "aim"))
    [run_hash] = repo.list_all_runs()  # the resumed run is the same run
    stored = repo.get_run(run_hash)
    assert stored.name == "test"
    assert stored["config"]["seed"] == 3
    rewards = stored.get_metric("reward", Context({"kind": "update"}))
    assert sorted(rewards.values.values_list()) == [1.0, 2.0, 30.0]
    accuracy = stored.get_metric("accuracy", Context({"kind": "evaluation", "control": "jpeg_size"}))
    assert accuracy.values.values_list() == [0.75]
    [[image]] = stored.get_image_sequence("samples", Context({})).values.values_list()
    assert image.caption == "class 0"
    assert np.array_equal(np.asarray(image.to_pil_image()), picture)
