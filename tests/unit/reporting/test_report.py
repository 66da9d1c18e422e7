"""The report: complete, strict JSON, and a page that needs nothing from outside."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from ctrl_ray.config import TrainConfig
from ctrl_ray.evaluation.judging import judge
from ctrl_ray.reporting.report import Evaluation, make_summary, write_report
from ctrl_ray.reporting.sample_grid import thumbnail
from tests.unit.evaluation.helpers import CONTROL, brightness, flat_samples

CONTROLS = {"light": CONTROL}
LABELS = [0, 1, 2, 0, 1, 2, 0, 1]


def _evaluation(values, by):
    log_probs = np.log(np.full((8, 3), 1 / 3))
    samples = flat_samples(values, LABELS, log_probs=log_probs)
    scores = np.array([1, 1, 0, 1, 1, 1, 1, 1.0]) if by == "label" else np.ones(8)
    fidelity = lambda images, prompts: scores  # noqa: E731
    return Evaluation(judge(samples, CONTROLS, oracles={"light": brightness}, fidelity=fidelity, by=by), samples)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rows = [
        {"kind": "update", "update": 1, "time": 0.0, "reward": -1.0, "kl": 0.1, "update_s": 2.0},
        {"kind": "evaluation", "update": 1, "time": 1.0, "accuracy": 0.5, "kl": 0.2},
        {"kind": "evaluation", "update": 2, "time": 1.0, "accuracy": 0.75, "kl": 0.9},
    ]
    reliability = folder / "reliability.png"
    Image.new("RGB", (8, 8)).save(reliability)
    page = write_report(
        folder / "report",
        controls=CONTROLS,
        before=_evaluation([10, 10, 10, 100, 100, 100, 200, 200], "oracle"),
        after=_evaluation([10, 100, 200, 12, 110, 210, 60, 120], "label"),
        config=TrainConfig(output_dir="runs/<script>alert(1)</script>", controls=CONTROLS),
        metrics_rows=rows,
        classifier_figures={"Reliability of <light>": reliability},
        facts={"wall-clock time": "7 min"},
    )
    return page


def test_summary_has_the_keys_that_others_read(report):
    summary = json.loads((report.parent / "summary.json").read_text(), parse_constant=pytest.fail)
    for side in ("before", "after"):
        for key in ("accuracy", "macro_f1", "prompt_fidelity", "kl", "diversity", "num_samples"):
            assert isinstance(summary[side][key], int | float), (side, key)
    assert summary["before"]["accuracy"] == 2 / 8  # asked 0 1 2 0 1 2 0 1, true 0 0 0 1 1 1 2 2
    assert summary["after"]["accuracy"] == 1.0
    assert summary["changes"]["prompt_fidelity"]["mean"] == -1 / 8
    assert summary["changes"]["accuracy"]["mean"] == 6 / 8


def test_page_needs_nothing_from_outside_and_escapes_text(report):
    text = re.sub(r"base64,[^\"]*", "base64,", report.read_text(encoding="utf-8"))
    sources = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'>\s]{0,30})""", text)
    assert len(sources) == 8  # seven figures and the classifier's
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http" not in re.sub(r"http-equiv", "", text)
    assert not re.search(r"<script|@import|url\(|<b>", text)
    assert "&lt;script&gt;" in text
    assert "Reliability of &lt;light&gt;" in text
    assert 'name="viewport"' in text


def test_page_shows_every_picture_that_was_written(report):
    names = {path.name for path in report.parent.glob("*.png")}
    assert names == {
        "samples_light.png",
        "confusion_light.png",
        "values_light.png",
        "calibration_light.png",
        "curves.png",
        "kl_against_accuracy.png",
        "kl_per_step.png",
    }
    for path in report.parent.glob("*.png"):
        with Image.open(path) as image:
            assert image.width >= 400
            assert len(set(np.asarray(image.convert("L")).reshape(-1)[::7].tolist())) > 2, path


def test_without_a_before_there_is_only_an_after():
    summary = make_summary(None, _evaluation([10, 100, 200, 12, 110, 210, 60, 120], "label"))
    assert list(summary) == ["after"]


def test_pairs_are_compared_only_when_they_are_pairs():
    before = _evaluation([10] * 8, "oracle")
    after = _evaluation([10, 100, 200, 12, 110, 210, 60, 120], "label")
    other = after._replace(samples=after.samples.select(np.arange(8)[::-1]))
    assert "prompt_fidelity" in make_summary(before, after)["changes"]
    assert "prompt_fidelity" not in make_summary(before, other)["changes"]


def test_thumbnail_keeps_pixels_and_the_aspect():
    wide = np.zeros((2, 4, 3), dtype=np.uint8)
    wide[0] = (200, 10, 30)
    small = thumbnail(wide, 8)
    assert small.shape == (8, 8, 3)
    assert (small[:2] == 255).all()
    assert (small[6:] == 255).all()
    assert (small[2:4] == (200, 10, 30)).all()
    assert (small[4:6] == 0).all()
