"""The record of a run: what is written, what a resume drops, and that a tracker is only a view."""

import json
import sys
import tempfile
import warnings

import numpy as np
import pytest

from ctrl_ray.config.tracker import Tracker
from ctrl_ray.errors import DataError, RunFolderError
from ctrl_ray.reporting import sinks
from ctrl_ray.reporting.aim_sink import _plainly_named
from ctrl_ray.reporting.tracking import METRICS_FILE, RunTracker, read_metrics

CONFIG = {"seed": 3, "controls": {"jpeg_size": {"thresholds": (1.0, 2.0), "oracle": None}}}


def _tracker(folder, **options):
    return RunTracker(folder, run_name="test", config=CONFIG, **{"tracker": "none", **options})


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

    monkeypatch.setattr(sinks, "AimSink", Broken)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # where this Python has no Aim too
    with pytest.warns(RuntimeWarning, match=r"Aim could not open \(RuntimeError: disk full\)"):
        tracker = _tracker(tmp_path, tracker="aim")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tracker.log("update", 1, {"reward": 1.0})
        tracker.log_images(1, "samples", [np.zeros((4, 4, 3), np.uint8)], ["a"])
        tracker.close()
    assert read_metrics(tmp_path)[0]["reward"] == 1.0


def _events(folder):
    """Tag to (step, value) of all scalars of a folder's event files, in the order of writing; purged ones are left out."""
    from tensorboardX.proto.event_pb2 import Event

    scalars = {}
    for file in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + length]), data[16 + length :]
            if event.session_log.status == event.session_log.START:
                scalars = {tag: [row for row in rows if row[0] < event.step] for tag, rows in scalars.items()}
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars.setdefault(value.tag, []).append((event.step, round(value.simple_value, 6)))
                elif value.HasField("image"):
                    scalars.setdefault(value.tag, []).append((event.step, (value.image.height, value.image.width)))
    return scalars


def test_tensorboard_has_the_rows_and_pictures_and_a_resume_takes_the_place_of_later_ones(tmp_path):
    """Read back from the event files."""
    with _tracker(tmp_path, tracker="tensorboard") as tracker:
        for update in (1, 2, 3):
            tracker.log("update", update, {"reward": -1.0 / update})
        tracker.log_images(3, "samples", [np.zeros((4, 6, 3), np.uint8)], ["a circle"])
    with _tracker(tmp_path, tracker="tensorboard", resume_from_update=2) as tracker:
        tracker.log("update", 3, {"reward": 7.0})
        tracker.log("evaluation", 3, {"accuracy/size": 0.5})
    found = _events(tmp_path / "tensorboard")
    assert found["update/reward"] == [(1, -1.0), (2, -0.5), (3, 7.0)]
    assert found["evaluation/accuracy/size"] == [(3, 0.5)] and found["samples/0"] == []
    assert not (tmp_path / "aim").exists()


def test_tensorboard_stands_in_where_aim_is_not_installed(tmp_path, monkeypatch):
    """Said in one line; what is named otherwise stays."""
    monkeypatch.setitem(sys.modules, "aim", None)
    chosen, line = sinks.present_tracker("aim")
    assert chosen == Tracker("tensorboard", None) and "\n" not in line
    assert line.startswith("tracker    Aim is not installed (it has no wheels for Python 3.13 and later; this is 3.")
    assert sinks.present_tracker("none") == (Tracker("none", None), None)
    with _tracker(tmp_path, tracker="aim") as tracker:
        tracker.log("update", 1, {"reward": 1.0})
    assert _events(tmp_path / "tensorboard")["update/reward"] == [(1, 1.0)]


@pytest.mark.parametrize("name", ["50%25", "why?", "run #1"])
def test_aim_gets_a_plain_path_of_a_folder_with_odd_signs(name, tmp_path, monkeypatch):
    """It makes the address of its database of the path; a resumed run has the same link."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    folder = tmp_path / name / "aim"
    folder.mkdir(parents=True)
    link = _plainly_named(folder)
    assert link.resolve() == folder and not set("%?#") & set(str(link))
    assert _plainly_named(folder) == link and list(link.parent.iterdir()) == [link]
    assert _plainly_named(tmp_path) == tmp_path
