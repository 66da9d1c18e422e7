"""A sweep's table, theory and report, from trials made by hand."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ctrl_ray.config.tracker import Tracker
from ctrl_ray.evaluation.judging import judge
from ctrl_ray.reporting.summary import Evaluation
from ctrl_ray.tuning.results import figures as sweep_figures
from ctrl_ray.tuning.results import parallel_figure, report
from ctrl_ray.tuning.results.findings import SweepFindings
from ctrl_ray.tuning.results.report import dial_gaps, write_sweep_report
from ctrl_ray.tuning.results.tracking import SweepTracker, _Tail
from ctrl_ray.tuning.results.trials import (
    SweepTrial,
    best_trial,
    equal_exponents,
    exponent_correlation,
    format_trials,
    pareto_front,
    predict_optimum,
    short_names,
)
from tests.pictures import dots, line, texts
from tests.unit.evaluation.helpers import CONTROL, brightness, flat_samples

STRENGTH = "controls.light.guidance_strength"
KNOBS = ("kl_coef", STRENGTH)


def _trial(name: str, kl_coef: float, strength: float, kl: float, accuracy: float, **others) -> SweepTrial:
    return SweepTrial(
        name=name,
        knobs={"kl_coef": kl_coef, STRENGTH: strength},
        guidance_strength=strength,
        kl_coef=kl_coef,
        **{
            "status": "finished",
            "updates_done": 28,
            "seconds": 90.0,
            "metrics": {"accuracy": accuracy, "kl": kl, "kl_error": 0.05, "prompt_fidelity": 0.9},
            **others,
        },
    )


TRIALS = [
    _trial("0", 2.0, 0.6, 0.2, 0.30),
    _trial("1", 0.5, 0.5, 1.0, 0.50),
    _trial("2", 2.0, 2.0, 1.25, 0.52),
    _trial("3", 0.5, 3.0, 4.0, 0.90),
    _trial("4", 1.0, 6.0, 5.4, 0.88),
    _trial("5", 1.0, 1.0, 9.0, 1.0, status="stopped early"),
    _trial("6", 1.0, 1.0, math.nan, math.nan, status="failed", error="ConfigError: <b>no</b>", metrics={}),
]


def test_the_table_tells_what_happened_to_each() -> None:
    lines = format_trials(TRIALS, KNOBS).splitlines()
    assert lines[0].split() == [
        *("trial", "kl_coef", "guidance_strength", "updates", "accuracy", "KL", "/", "nats", "fidelity", "minutes")
    ]
    assert lines[1].split() == ["0", "2", "0.6", "28", "0.300", "0.20", "0.900", "1.5", "finished"]
    assert lines[6].endswith("stopped early")
    assert lines[7].split()[4:7] == ["–", "–", "–"] and lines[7].endswith("failed: ConfigError: <b>no</b>")


def test_the_table_has_every_control_and_the_gap_where_they_are_known() -> None:
    """Sorted by name, the mean beside; a trial without an end has a mean only."""
    several = {
        "accuracy": 0.69,
        "accuracy/size": 0.87,
        "accuracy/size_error": 0.02,
        "accuracy/colour": 0.51,
        "gap": 2.125,
    }
    ended = _trial("0", 1.0, 2.0, 5.0, 0.69, metrics={**several, "kl": 6.25})
    running = _trial("1", 1.0, 2.0, 5.0, 0.5, status="running", metrics={"accuracy": 0.5, "kl": 1.0})
    head, first, second = format_trials([ended, running], ["kl_coef"]).splitlines()
    results = ["accuracy of colour", "accuracy of size", "mean accuracy", "gap / nats", "KL / nats", "fidelity"]
    assert re.split(r"  +", head)[3:-1] == results
    assert first.split()[3:-2] == ["0.510", "0.870", "0.690", "2.12", "6.25", "–"]
    assert second.split()[3:-2] == ["–", "–", "0.500", "–", "1.00", "–"]
    least = best_trial([ended, dataclasses.replace(ended, name="2", metrics={**several, "gap": 1.5})], "gap", "min")
    assert least is not None and least.name == "2"


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["optimizer.learning_rate", "classifier.learning_rate", "lora.rank"]) == {
        "optimizer.learning_rate": "optimizer.learning_rate",
        "classifier.learning_rate": "classifier.learning_rate",
        "lora.rank": "rank",
    }


def test_only_finished_trials_are_best() -> None:
    best = best_trial(TRIALS, "accuracy", "max")
    assert best is not None and best.name == "3"
    least = best_trial(TRIALS, "kl", "min")
    assert least is not None and least.name == "0"
    assert best_trial(TRIALS[5:], "accuracy", "max") is None


def test_the_front_is_what_no_other_trial_beats() -> None:
    kl, accuracy = [0.0, 1.0, 1.0, 2.0, 3.0, 4.0], [0.2, 0.5, 0.4, 0.45, 0.6, 0.6]
    beaten = {
        i
        for i in range(6)
        for j in range(6)
        if kl[j] <= kl[i] and accuracy[j] >= accuracy[i] and (kl[j], accuracy[j]) != (kl[i], accuracy[i])
    }
    assert set(pareto_front(kl, accuracy)) == set(range(6)) - beaten == {0, 1, 4}


def test_ratio_and_kl() -> None:
    # exponents 0.3, 1, 1, 6, 6: midranks 1, 2.5, 2.5, 4.5, 4.5 against 1 to 5
    x, y = np.array([1, 2.5, 2.5, 4.5, 4.5]) - 3, np.arange(1, 6) - 3
    assert exponent_correlation(TRIALS) == pytest.approx(float(x @ y / math.sqrt((x @ x) * (y @ y))))
    assert exponent_correlation(TRIALS[:2]) is None
    one, six = equal_exponents(TRIALS)
    assert (one.exponent, one.names, one.agree, one.allowed) == (1.0, ("1", "2"), True, pytest.approx(0.3375))
    assert (six.names, six.agree, six.allowed) == (("3", "4"), True, pytest.approx(1.41))
    apart = equal_exponents(
        [*TRIALS[:3], dataclasses.replace(TRIALS[2], name="7", metrics={"accuracy": 0.5, "kl": 2.0})]
    )
    assert not apart[0].agree


def test_the_predicted_optimum_is_the_tilt() -> None:
    """Two kinds of images, equally likely, of which the classifier says p = 0.8 and 0.2; it is right."""
    beliefs = np.array([[0.8, 0.2]] * 4 + [[0.2, 0.8]] * 4)
    truth = np.array([0, 0, 0, 1, 1, 1, 1, 1])
    prediction = predict_optimum(np.log(beliefs), truth, np.array([0.0, 1.0, 3.0]))
    for index, exponent in enumerate((0.0, 1.0, 3.0)):
        share = 0.8**exponent / (
            0.8**exponent + 0.2**exponent
        )  # of the kind that is likely of the class, under the tilt
        accuracy = (share * 0.75 + share * 1.0 + (1 - share) * 0.25) / 2  # class 0: 3/4 or 0 right; class 1: 1 or 1/4
        kl = share * math.log(2 * share) + (1 - share) * math.log(2 * (1 - share))
        assert prediction.accuracy[index] == pytest.approx(accuracy)
        assert prediction.kl[index] == pytest.approx(kl, abs=1e-12)
    assert prediction.effective_samples[0] == pytest.approx(8)


def _findings(tmp_path: Path) -> SweepFindings:
    samples = flat_samples([30, 100, 200, 90, 220, 40], [0, 1, 2, 0, 1, 2], log_probs=np.log(np.full((6, 3), 1 / 3)))
    judged = judge(samples, {"light": CONTROL}, oracles={"light": brightness})
    evaluation = Evaluation(judged, samples)
    dial = {0.5: {"accuracy": 0.4, "kl": 0.6}, 1.0: {"accuracy": 0.9, "kl": 4.0}, 2.0: {"accuracy": 1.0, "kl": 50.0}}
    return SweepFindings(
        name="<mine>",
        trials=TRIALS,
        knobs=KNOBS,
        metric="accuracy",
        mode="max",
        controls={"light": CONTROL},
        before=evaluation,
        best=TRIALS[3],
        shown={"best,\nratio 6": (TRIALS[3], evaluation)},
        dial_of=TRIALS[3],
        dial=dial,
        adapter="/sweeps/mine/adapter",
    )


def test_the_dial_is_compared_at_equal_kl(tmp_path: Path) -> None:
    # at 0.6 nats the trials have, halfway between (0.2, 0.30) and (1.0, 0.50), 0.40; 50 nats are out of their range
    assert dial_gaps(_findings(tmp_path)) == [{"scale": 0.5, "gap": pytest.approx(0.0)}]


@pytest.mark.full
def test_the_report_is_one_page_with_every_picture(tmp_path: Path, figures: dict[str, Figure]) -> None:
    page, written = write_sweep_report(tmp_path, _findings(tmp_path))
    assert (
        figures.keys()
        == {path.name for path in written.values()}
        == {*("accuracy_map.png", "pareto.png", "exponent.png", "parallel.png", "samples.png", "dial.png")}
    )
    for path in written.values():
        with Image.open(path) as picture:
            assert picture.format == "PNG" and min(picture.size) > 300
    _check_pictures(figures)
    text = page.read_text()
    assert text.count("<img") == 6 and 'src="http' not in text and "<script" not in text
    assert "<b>no</b>" not in text and "&lt;mine&gt;" in text
    for words in ("python -m ctrl_ray.sample --adapter /sweeps/mine/adapter", "5 finished, 1 stopped early, 1 failed"):
        assert words in text
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["best"] == "3" and results["trials"][6]["error"] == "ConfigError: <b>no</b>"
    assert results["rank_correlation_of_exponent_and_kl"] == exponent_correlation(TRIALS)


def _check_pictures(figures: dict[str, Figure]) -> None:
    """The five finished trials at their places, in the order of TRIALS."""
    kl, accuracy = [0.2, 1.0, 1.25, 4.0, 5.4], [0.30, 0.50, 0.52, 0.90, 0.88]
    axis = figures["accuracy_map.png"].axes[0]
    places = [[2.0, 0.6], [0.5, 0.5], [2.0, 2.0], [0.5, 3.0], [1.0, 6.0]]  # kl_coef, guidance_strength
    np.testing.assert_allclose(dots(axis), np.log10(places))
    assert texts(axis)[:5] == [f"{value:.2f}" for value in accuracy]
    axis = figures["pareto.png"].axes[0]
    np.testing.assert_allclose(dots(axis), np.stack([kl, accuracy], axis=1))
    front = line(axis, "front: no trial beats these")
    assert front.tolist() == [[0.2, 0.30], [1.0, 0.50], [1.25, 0.52], [4.0, 0.90]]  # not trial 4, which trial 3 beats
    axis = figures["exponent.png"].axes[0]
    exponents = [0.3, 1.0 / 1.03, 1.0 * 1.03, 6.0 / 1.03, 6.0 * 1.03]  # equal ones 3 % to each side
    np.testing.assert_allclose(dots(axis), np.stack([exponents, kl], axis=1))
    axis = figures["parallel.png"].axes[0]
    lines = {tuple(np.round(each.get_ydata(), 6)) for each in axis.lines if len(each.get_xdata()) == 6}
    for trial, exponent in zip(TRIALS, (0.3, 1, 1, 6, 6)):
        share = lambda value, low, high: math.log(value / low) / math.log(high / low)  # noqa: E731
        expected = (
            share(trial.kl_coef, 0.5, 2.0),
            share(trial.guidance_strength, 0.5, 6.0),
            share(exponent, 0.3, 6.0),
            (trial.metrics["kl"] - 0.2) / 5.2,
            0.5,  # all have the same fidelity
            (trial.metrics["accuracy"] - 0.3) / 0.6,
        )
        assert tuple(np.round(expected, 6)) in lines, trial.name
    axis = figures["dial.png"].axes[0]
    dial = line(axis, "adapter of trial 3 (exponent 6), scaled")
    assert dial.tolist() == [[0.6, 0.4], [4.0, 0.9], [50.0, 1.0]]
    assert texts(axis)[:3] == ["0.5", "1", "2"]
    axis = figures["samples.png"].axes[0]
    marks = [text.split()[0] + text[-1] for text in texts(axis) if text.endswith(("✓", "✗"))]
    assert marks == [*("30✓", "90✗") * 2, *("100✓", "220✗") * 2, *("200✓", "40✗") * 2]  # before and best: equal here


def test_a_sweeps_page_has_every_control_and_the_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "draw_figures", lambda *_: [])
    numbers = {"accuracy": 0.69, "kl": 6.25, "gap": 2.125, "gap_error": 0.25}
    numbers |= {"accuracy/size": 0.87, "accuracy/size_error": 0.02, "accuracy/colour": 0.51}
    best = _trial("0", 1.0, 2.0, 5.0, 0.69, metrics=numbers)
    page, _ = write_sweep_report(tmp_path, dataclasses.replace(_findings(tmp_path), trials=[best], best=best))
    html = page.read_text().replace("\N{NO-BREAK SPACE}", " ")
    assert "0.69 (accuracy of colour 0.510, accuracy of size 0.870 ± 0.020), 6.25 nats from" in html
    assert "<td>0.510</td><td>0.870 ± 0.020</td><td>0.690</td><td>2.12 ± 0.25</td><td>6.25</td>" in html
    [stored] = json.loads((tmp_path / "results.json").read_text())["trials"]
    assert (stored["gap"], stored["gap_error"], stored["accuracy/size"]) == (2.125, 0.25, 0.87)


def test_a_sweep_of_which_nothing_finished_has_a_report_too(tmp_path: Path) -> None:
    nothing = dataclasses.replace(
        _findings(tmp_path), trials=TRIALS[5:], best=None, shown={}, dial_of=None, dial={}, adapter=""
    )
    page, figures = write_sweep_report(tmp_path, nothing)
    assert figures == {} and "2 trials: 1 stopped early, 1 failed." in page.read_text()


def test_trials_on_a_line_and_settings_that_are_words_are_drawn(tmp_path: Path, figures: dict[str, Figure]) -> None:
    trials = [_trial(str(i), 1.0, g, g, 0.2 + 0.1 * i) for i, g in enumerate((1.0, 2.0, 4.0))]
    assert sweep_figures.plot_accuracy_map(tmp_path / "map.png", trials) is not None
    words = [dataclasses.replace(t, knobs={"estimator.name": n}) for t, n in zip(trials, ("full", "last_k", "full"))]
    assert parallel_figure.plot_parallel(tmp_path / "parallel.png", words, ["estimator.name"]) is not None
    assert sweep_figures.plot_accuracy_map(tmp_path / "none.png", trials[:2]) is None
    np.testing.assert_allclose(dots(figures["map.png"].axes[0]), np.log10([[1.0, 1.0], [1.0, 2.0], [1.0, 4.0]]))
    assert not figures["map.png"].axes[0].images  # no surface through points on a line
    heights = [list(each.get_ydata()) for each in figures["parallel.png"].axes[0].lines if len(each.get_xdata()) == 5]
    assert [each[0] for each in heights] == [0, 1, 0]  # full, last_k, full


def test_a_file_is_followed_through_growth_and_rewriting(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = _Tail(path)
    assert tail.read() == []
    path.write_text('{"update": 1}\n{"upd')
    assert tail.read() == [{"update": 1}]
    with path.open("a") as file:
        file.write('ate": 2}\n')
    assert tail.read() == [{"update": 2}]
    draft = tmp_path / "draft"
    draft.write_text('{"update": 1}\n{"update": 7, "kind": "longer than before"}\n')
    draft.replace(path)
    assert [row["update"] for row in tail.read()] == [1, 7]


@pytest.mark.full
def test_aim_that_fails_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "update", "update": 1, "kl": 0.5}\n')
    (tmp_path / "file").write_text("")  # no folder can be made beneath it
    tracker = SweepTracker(
        Tracker("aim", str(tmp_path / "file" / "aim")), tmp_path, experiment="x", config={}, resume=False
    )
    trial = dataclasses.replace(TRIALS[0], folder=tmp_path)
    with pytest.warns(RuntimeWarning, match=r"Aim could not log metrics \(NotADirectoryError") as caught:
        tracker.follow([trial, dataclasses.replace(trial, name="other")])
        tracker.log_images("sweep", {})
    assert [warning.category for warning in caught].count(RuntimeWarning) == 1
