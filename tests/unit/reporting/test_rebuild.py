"""A report that is made anew from a run's files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from ctrl_ray import report
from ctrl_ray.config.json import to_json
from ctrl_ray.config.presets import preset
from ctrl_ray.reporting.pictures import existing_pictures

ROWS = [
    {"kind": "evaluation", "update": 0, "time": 1.0, "accuracy": 0.25, "kl": 0.0, "gap": 40.0},
    {"kind": "update", "update": 1, "time": 2.0, "reward": -3.0, "kl": 0.1, "update_s": 2.0},
    {"kind": "update", "update": 2, "time": 4.0, "reward": -2.0, "kl": 0.2, "update_s": 2.0},
    {"kind": "evaluation", "update": 2, "time": 9.0, "accuracy": 0.5, "kl": 0.3, "gap": 20.0},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run of two updates, which has a checkpoint and a classifier."""
    root = tmp_path / "run"
    for folder in ("checkpoints/2", "classifier/jpeg_size"):
        (root / folder).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(root / "classifier" / "jpeg_size" / "reliability.png")
    (root / "config.json").write_text(to_json(preset("shapes")))
    (root / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return root


def test_of_a_run_that_stopped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """How far it came, its evaluations, its curves, and the command that goes on."""
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out == f"report   {run}/report/report.html\n"
    page = (run / "report" / "report.html").read_text()
    assert "made 2 of 200 updates and has not finished" in page
    assert f"python -m ctrl_ray.train --config {run}/config.json --resume" in page
    rows = re.findall(r"<tr><td>(\d)</td><td>([\d.]+)</td><td>([\d.]+)</td><td>([\d.]+)</td></tr>", page)
    assert rows == [("0", "0.250", "0.000", "40.000"), ("2", "0.500", "0.300", "20.000")]
    assert page.count("data:image/png") == 3  # curves, KL against accuracy, calibration
    for picture in re.findall("<img [^>]*>", page):
        assert re.search('alt="[^"]+"', picture)


def test_of_a_run_that_finished(run: Path) -> None:
    """Its numbers and the pictures of its samples stay; the curves are drawn anew."""
    folder = run / "report"
    folder.mkdir()
    judged = {
        "classes": ["a", "b"],
        "judged_by": "the oracle 'jpeg_size'",
        "num_samples": 64,
        "accuracy": 0.75,
        "accuracy_interval": [0.6, 0.9],
        "belief_gap": None,
        "values": None,
    }
    numbers = {"accuracy": 0.75, "macro_f1": 0.74, "kl": 2.5, "num_samples": 64, "joint_accuracy": None}
    numbers |= dict.fromkeys(("prompt_fidelity", "clip_score", "brisque", "diversity", "belief_gap"))
    errors = dict.fromkeys(numbers)
    after = {
        **numbers,
        "standard_errors": errors,
        "controls": {"jpeg_size": {**numbers, **judged, "standard_errors": errors}},
    }
    (folder / "summary.json").write_text(json.dumps({"after": after}))
    for name, colour in (("samples_jpeg_size", "red"), ("curves", "red")):
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
    kept = (folder / "samples_jpeg_size.png").read_bytes()
    assert report.main([str(run)]) == 0
    page = (folder / "report.html").read_text()
    assert "75.0% are truly of the class that was asked for" in page
    assert (folder / "samples_jpeg_size.png").read_bytes() == kept
    with Image.open(folder / "curves.png") as curves:
        assert curves.width >= 400
    names = [figure.path.stem for figure in existing_pictures(folder, after)]
    assert names == ["samples_jpeg_size", "curves", "kl_against_accuracy"]
    assert page.count("data:image/png") == 4
    assert f"--adapter {run}/adapter" in page


def test_what_is_no_run_and_what_is_no_summary(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One message each, with the file."""
    assert report.main([str(tmp_path)]) == 2
    assert f"{tmp_path} holds no config.json; expected the local folder of a run" in capsys.readouterr().err
    (run / "report").mkdir()
    (run / "report" / "summary.json").write_text("[1]")
    assert report.main([str(run)]) == 2
    assert "summary.json is not a summary of a run" in capsys.readouterr().err
