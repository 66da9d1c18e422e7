"""The report: complete, strict JSON, and a page that needs nothing from outside."""

import dataclasses
import json
import re

import numpy as np
import pytest
from PIL import Image

from ctrl_ray.config import TrainConfig
from ctrl_ray.evaluation.judging import judge
from ctrl_ray.evaluation.metric_names import definition
from ctrl_ray.reporting.curves import plot_curves, plot_kl_against_accuracy
from ctrl_ray.reporting.page import Source, render_page
from ctrl_ray.reporting.report import write_report
from ctrl_ray.reporting.sample_grid import thumbnail
from ctrl_ray.reporting.summary import Evaluation, make_summary
from tests.pictures import dots, heights, line, recorded, texts
from tests.unit.evaluation.helpers import CONTROL, brightness, flat_samples

CONTROLS = {"light": CONTROL}
LABELS = [0, 1, 2, 0, 1, 2, 0, 1]
NUMBERS = {"objective": -4.5, "log_z": -1.5, "gap": 3.0, "gap_standard_error": 0.21, "ess": 0.034, "pareto_k": 1.2}
CERTIFICATE = {
    **NUMBERS,
    "bounds": [-2.5, None],
    "too_wide": True,
    "certificate/light/dark": {
        **NUMBERS,
        "gap": 2.25,
        "pareto_k": float("nan"),
        "bounds": [-2.0, None],
        "too_wide": True,
    },
}


def _evaluation(values, by):
    log_probs = np.log(np.full((8, 3), 1 / 3))
    samples = flat_samples(values, LABELS, log_probs=log_probs)
    scores = np.array([1, 1, 0, 1, 1, 1, 1, 1.0]) if by == "label" else np.ones(8)
    fidelity = lambda images, prompts: scores  # noqa: E731
    return Evaluation(judge(samples, CONTROLS, oracles={"light": brightness}, fidelity=fidelity, by=by), samples)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page, and what was drawn by file name."""
    folder = tmp_path_factory.mktemp("report")
    rows = [
        {"kind": "update", "update": 1, "time": 0.0, "reward": -1.0, "kl": 0.1, "update_s": 2.0},
        {"kind": "evaluation", "update": 1, "time": 1.0, "accuracy": 0.5, "kl": 0.2},
        {
            "kind": "evaluation",
            "update": 2,
            "time": 1.0,
            "accuracy": 0.75,
            "kl": 0.9,
            "gap": 4.5,
            "gap_standard_error": 0.5,
        },
        {"kind": "evaluation", "update": 2, "time": 2.0, "accuracy": 0.8, "kl": 1.0},  # the report's own
    ]
    reliability = folder / "reliability.png"
    Image.new("RGB", (8, 8)).save(reliability)
    with recorded() as figures:
        page = write_report(
            folder / "report",
            controls=CONTROLS,
            before=_evaluation([10, 10, 10, 100, 100, 100, 200, 200], "oracle"),
            after=_evaluation([10, 100, 200, 12, 110, 210, 60, 120], "label"),
            config=TrainConfig(output_dir="runs/<script>alert(1)</script>", controls=CONTROLS),
            metrics_rows=rows,
            classifier_figures={"Reliability of <light>": reliability},
            facts={"wall-clock time": "7 min"},
            kl_noise_floor=0.00617,
            certificate=CERTIFICATE,
        )
    return page, figures


@pytest.fixture(scope="module")
def report(written):
    return written[0]


@pytest.fixture(scope="module")
def drawn(written):
    return written[1]


def test_summary_has_the_keys_that_others_read(report):
    summary = json.loads((report.parent / "summary.json").read_text(), parse_constant=pytest.fail)
    for side in ("before", "after"):
        for key in ("accuracy", "macro_f1", "prompt_fidelity", "kl", "diversity", "num_samples"):
            assert isinstance(summary[side][key], int | float), (side, key)
    assert summary["before"]["accuracy"] == 2 / 8  # asked 0 1 2 0 1 2 0 1, true 0 0 0 1 1 1 2 2
    assert summary["after"]["accuracy"] == 1.0
    assert summary["changes"]["prompt_fidelity"]["mean"] == -1 / 8
    assert summary["changes"]["accuracy"]["mean"] == 6 / 8


def test_the_floor_of_the_kl_is_beside_it(report):
    """In the headline, in the table, and as a number; nowhere when it is not known."""
    page = report.read_text(encoding="utf-8")
    assert re.search(r"The policy is [\d.]+ nats from the pre-trained model \(floor 0\.0062\)\.", page)
    assert "<td>KL / nats (floor 0.0062)</td>" in page and "below its floor, 0.0062 nats, cannot" in page
    assert json.loads((report.parent / "summary.json").read_text())["kl_noise_floor"] == 0.00617


def test_the_distance_to_the_target_is_told_in_words_and_by_class(report):
    """And stands among the numbers after; a number that is not known is null."""
    page = report.read_text(encoding="utf-8")
    assert (
        "It is 3.0 ± 0.2 nats from the best that any sampler can do (effective sample size 3.4%; bounds on it would be too wide"
        in page
    )
    rows = re.findall(r"<tr><td>(all|light, class dark)</td>(.*?)</tr>", page)
    cells = {name: re.sub(r"<[^>]*>", " ", row).split() for name, row in rows}
    assert cells["all"] == ["-4.50", "-1.50", "3.00", "±", "0.210", "3.4%", "1.20"]
    assert cells["light, class dark"][2] == "2.25" and cells["light, class dark"][-2:] == ["not", "known"]
    after = json.loads((report.parent / "summary.json").read_text())["after"]
    assert after["gap"] == 3.0 and after["bounds"] == [-2.5, None]
    assert after["certificate/light/dark"]["pareto_k"] is None
    assert all(definition(name).meaning for name in NUMBERS)


def test_page_needs_nothing_from_outside_and_escapes_text(report):
    text = re.sub(r"base64,[^\"]*", "base64,", report.read_text(encoding="utf-8"))
    sources = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'>\s]{0,30})""", text)
    assert len(sources) == 9  # eight figures and the classifier's
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
        "distance.png",
    }
    for path in report.parent.glob("*.png"):
        with Image.open(path) as image:
            assert image.format == "PNG" and image.width >= 400


def test_curves_are_the_rows_of_the_run(drawn):
    reward, kl, accuracy, gap = drawn["curves.png"].axes
    assert line(reward, "training batch").tolist() == [[1, -1.0]]
    assert line(kl, "training batch").tolist() == [[1, 0.1]]
    assert line(kl, "evaluation").tolist() == [[1, 0.2], [2, 0.9], [2, 1.0]]
    assert line(accuracy, "evaluation").tolist() == [[1, 0.5], [2, 0.75], [2, 0.8]]
    assert line(gap, "evaluation").tolist() == [[2, 4.5]]
    [bars] = gap.collections
    assert bars.get_segments()[0].tolist() == [[2, 3.5], [2, 5.5]]  # two standard errors
    [axis] = drawn["kl_against_accuracy.png"].axes
    assert axis.lines[0].get_xydata().tolist() == [[0.2, 0.5], [0.9, 0.75], [1.0, 0.8]]
    assert texts(axis) == ["update 1", "2", "final"]
    [axis] = drawn["kl_per_step.png"].axes
    assert heights(axis) == [0.25] * 4 and "1.00 nats in all" in axis.get_title(loc="left")


def test_what_was_measured_of_a_control_is_drawn(drawn):
    """Asked 0 1 2 0 1 2 0 1; before, truly 0 0 0 1 1 1 2 2; after, what was asked."""
    before, after = drawn["confusion_light.png"].axes
    for axis, counts in ((before, [[1, 1, 1], [1, 1, 1], [1, 1, 0]]), (after, [[3, 0, 0], [0, 3, 0], [0, 0, 2]])):
        assert [int(text.split("\n")[0]) for text in texts(axis)] == np.ravel(counts).tolist()
        shares = np.array(counts) / np.sum(counts, axis=1, keepdims=True)
        np.testing.assert_allclose(axis.images[0].get_array(), shares)
    panels = drawn["values_light.png"].axes
    for axis, values in zip(panels, ([10] * 3 + [100] * 3 + [200] * 2, [10, 12, 60], [100, 110, 120], [200, 210])):
        bars = axis.patches[-48:]  # before them, where there is one: the band of the class
        for value in values:
            [bar] = [bar for bar in bars if bar.get_x() <= value < bar.get_x() + bar.get_width()]
            assert bar.get_height() >= 1
        assert sum(bar.get_height() for bar in bars) == len(values)
        assert [float(border.get_xdata()[0]) for border in axis.lines] == [64.0, 128.0]
    assert panels[1].get_title(loc="left") == "after, asked for dark: 100% inside"
    [axis] = drawn["calibration_light.png"].axes
    for index, share in enumerate((0.25, 1.0)):
        np.testing.assert_allclose(dots(axis, index), [[1 / 3, share]])


def test_samples_are_shown_with_what_was_measured(drawn):
    """For each class a line before and a line after, of the same columns: 3, 3 and 2 samples."""
    [axis] = drawn["samples_light.png"].axes
    marks = [text for text in texts(axis) if text.endswith(("✓", "✗"))]
    values = [10, 100, 200, 10, 12, 60, 10, 100, 200, 100, 110, 120, 10, 100, 200, 210]
    assert [float(text.split()[0]) for text in marks] == values
    assert "".join(text[-1] for text in marks) == "✓✗✗" + "✓✓✓" + "✗✓✗" + "✓✓✓" + "✗✗" + "✓✓"
    pixels = np.asarray(axis.images[0].get_array())
    assert [int(pixels[34 + 64, 76 + column * 134 + 64, 0]) for column in range(3)] == [10, 100, 200]  # the first line


@pytest.fixture(scope="module")
def of_two_controls():
    """The summary and the page: all six combinations of two controls, four times each. Light is hit in 3 of 24 before and
    always after, the other one in half, before and after."""
    other = dataclasses.replace(CONTROL, thresholds=(128.0,), classes=("pale", "vivid"))
    controls = {"light": CONTROL, "other": other}
    asked = np.stack([np.arange(24) % 3, np.arange(24) // 3 % 2], axis=1)
    evaluations = []
    for shift, by in ((1, "oracle"), (0, "label")):
        classes = np.where(np.arange(24) < 3, asked[:, 0], (asked[:, 0] + shift) % 3)
        samples = flat_samples([(30, 100, 200)[index] for index in classes], [0] * 24)
        samples = dataclasses.replace(samples, labels=asked)
        oracles = {"light": brightness, "other": lambda image: 0.0}
        evaluations.append(Evaluation(judge(samples, controls, oracles=oracles, by=by), samples))
    summary = make_summary(*evaluations)
    return summary, render_page(
        summary, [], controls=controls, prompt="a circle", source=Source.of_adapter("a"), facts={}, config_json=None
    )


def test_several_controls_stand_beside_their_mean(of_two_controls):
    _, page = of_two_controls
    sentence = (
        "Of 24 samples, 100.0% are truly of the light class asked for (12.5% before training), 50.0% of the other class (50.0% "
        "before training); the mean is 75.0% (31.2% before training); 50.0% have every class asked for (12.5% before training)."
    )
    assert sentence in page
    rows = dict(re.findall(r"<tr><td>(accuracy[^<]*)</td>(.*?)</tr>", page))
    cells = {name: re.sub(r"<[^>]*>", " ", row).split() for name, row in rows.items()}
    error = np.sqrt(1 / 8 * 7 / 8 / 23)  # of a share of 1/8 in 24
    light = ["0.125", "±", f"{error:.3f}", "1.000", "±", "0.000", "+0.875", "±", f"{error:.3f}"]
    assert cells["accuracy of light"] == light
    assert cells["accuracy of other"][-3:] == ["+0.000", "±", "0.000"]
    assert cells["accuracy, mean"][-3:] == ["+0.438", "±", f"{error / 2:.3f}"]


def test_what_was_not_learned_is_in_the_head_and_in_the_summary(of_two_controls):
    summary, page = of_two_controls
    [words] = re.findall(r"<ul class='findings'>(.*?)</ul>", page)
    assert words.startswith("<li>other: accuracy 0.500 after, 0.500 before (difference +0.000 ± 0): not above")
    assert page.index("findings'>") < page.index("<h2>") and "light" not in words
    found = summary["after"]["not_learned"]
    assert [(entry["control"], entry["class"]) for entry in found] == [("other", c) for c in (None, "pale", "vivid")]
    assert found[0]["accuracy"]["difference"] == 0.0 and found[0]["log_prob"] is None


def test_several_controls_have_a_curve_each(tmp_path, figures):
    rows = [
        {"kind": "evaluation", "update": u, "kl": kl, "accuracy": a, "accuracy/light": b, "accuracy/other": 0.5}
        | {"gap": a, "gap/light/dark": 2.0, "gap/light/grey": 3.0}
        for u, kl, a, b in ((0, 0.0, 0.4, 0.3), (2, 3.0, 0.75, 1.0))
    ]
    plot_kl_against_accuracy(tmp_path / "kl.png", rows)
    plot_curves(tmp_path / "curves.png", [{key: value for key, value in row.items() if key != "kl"} for row in rows])
    accuracy, gap = figures["curves.png"].axes
    assert [each.get_label() for each in gap.lines if len(each.get_xdata()) > 1] == [
        "evaluation"
    ]  # none of the classes
    assert line(accuracy, "mean of the controls").tolist() == [[0, 0.4], [2, 0.75]]
    assert line(accuracy, "light").tolist() == [[0, 0.3], [2, 1.0]]
    [axis] = figures["kl.png"].axes
    assert line(axis, "mean of the controls").tolist() == [[0, 0.4], [3, 0.75]]
    assert line(axis, "other").tolist() == [[0, 0.5], [3, 0.5]]


def test_a_denoising_loss_has_a_curve_where_there_is_no_reward(tmp_path, figures):
    rows = [{"kind": "update", "update": u, "denoising_loss": 0.5 - 0.1 * u} for u in (1, 2)]
    plot_curves(tmp_path / "curves.png", [*rows, {"kind": "evaluation", "update": 2, "accuracy": 0.5}])
    loss, accuracy = figures["curves.png"].axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("denoising loss", "accuracy (true class)")
    np.testing.assert_allclose(line(loss, "training batch"), [[1, 0.4], [2, 0.3]])


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


def test_scores_of_images_are_shown_with_their_change():
    """Pairs of images that have one on both sides; what was not measured is on no line."""
    values, brisque = [10, 100, 200, 12, 110, 210, 60, 120], [np.full(8, 30.0), np.arange(8) + 20.0]
    brisque[0][0] = brisque[1][7] = np.nan
    before, after = (
        Evaluation(judged, samples)
        for scores in brisque
        for samples in [flat_samples(values, LABELS)]
        for judged in [
            judge(samples, CONTROLS, oracles={"light": brightness}, scorers={"brisque": lambda *_, s=scores: s})
        ]
    )
    summary = make_summary(before, after)
    assert summary["before"]["brisque"] == 30 and summary["after"]["brisque"] == 23
    change = summary["changes"]["brisque"]
    assert (change["mean"], change["num_pairs"]) == (pytest.approx(np.mean(np.arange(1, 7) + 20.0) - 30), 6)
    page = render_page(
        summary, [], controls=CONTROLS, prompt="p", source=Source.of_adapter("a"), facts={}, config_json=None
    )
    assert "<td>brisque</td>" in page and "-6.500" in page and "<td>clip score</td>" not in page
