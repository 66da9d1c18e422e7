"""The numbers of a comparison: distances to exact samples, means over seeds, the choice of a knob's value, who wins what."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from ctrl_ray.comparison.results import (
    Target,
    choose,
    distance_of,
    interval,
    numbers_of,
    over_seeds,
    verdicts,
)
from ctrl_ray.config import ControlConfig
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.verification.measured import Measured
from ctrl_ray.verification.rejection import Pool
from ctrl_ray.verification.target import joint_classes
from tests.unit.comparison.rows import row

CONTROL = ControlConfig(oracle="brightness_of:nothing", thresholds=(0.0,), classes=("low", "high"))
NAME = "level"


def measured(values: np.ndarray, labels: np.ndarray, log_probs: np.ndarray, **changes: Any) -> Measured:
    count = len(values)
    return Measured(
        prompts=("a",) * count,
        sample_ids=np.arange(count),
        labels=labels.reshape(-1, 1),
        class_log_probs={NAME: log_probs.astype(np.float32)},
        values={NAME: values},
        features=np.zeros((count, 4), np.float32),
        log_ratio=changes.get("log_ratio"),
    )


def target(rng: np.random.Generator) -> Target:
    """Values N(±1, 0.1²), of which each class accepts its own; classifiers that know it."""
    values = np.concatenate([rng.normal(-1, 0.1, 400), rng.normal(1, 0.1, 400)])
    classes = (values > 0).astype(int)
    log_probs = np.log(np.where(np.arange(2) == classes[:, None], 0.9, 0.1))
    controls = {NAME: CONTROL}
    pool = Pool(
        measured(values, classes, log_probs),
        np.stack([classes == 0, classes == 1]),
        np.array([0.5, 0.5]),
    )
    return Target(
        pool=pool, classes=joint_classes(controls), controls=controls, exponents={NAME: 1.0}, fidelity=None, seed=0
    )


def drawn(rng: np.random.Generator, shift: float) -> Measured:
    """64 of each class, those of 'high' moved."""
    labels = np.arange(128) % 2
    values = rng.normal(np.where(labels == 1, 1 + shift, -1), 0.1)
    return measured(values, labels, np.log(np.full((128, 2), 0.5)))


def test_exact_samples_are_at_one_noise_floor_and_moved_ones_as_far_as_they_were_moved() -> None:
    """A shift by 1 of 64 samples of standard deviation 0.1: Wasserstein 1, over a floor of its own."""
    rng = np.random.default_rng(0)
    of = target(rng)
    exact = distance_of(of, drawn(rng, 0.0))
    assert exact["images"] == 128
    assert all(0.4 < ratio < 2.5 for ratio in exact["classes"].values())
    moved = distance_of(of, drawn(rng, 1.0))
    assert list(moved["classes"]) == ["low", "high"]
    assert moved["classes"]["low"] < 2.5 and moved["worst"] == moved["classes"]["high"] > 20


def test_a_class_without_enough_exact_samples_has_no_distance() -> None:
    """The others still have theirs."""
    rng = np.random.default_rng(0)
    of = target(rng)
    few = of.pool.accepted.copy()
    few[1, np.flatnonzero(few[1])[5:]] = False
    short = Target(
        pool=Pool(of.pool.samples, few, of.pool.rates),
        classes=of.classes,
        controls=of.controls,
        exponents=of.exponents,
        fidelity=None,
        seed=0,
    )
    found = distance_of(short, drawn(rng, 0.0))
    assert found["classes"]["high"] is None
    assert found["worst"] == found["classes"]["low"]


def test_fewer_images_have_a_larger_floor_so_the_common_distance_is_of_the_first_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fixed shift is further, in floors, the more images there are."""
    rng = np.random.default_rng(1)
    labels = np.arange(128) % 2
    values = rng.normal(np.where(labels == 1, 1.3, -1), 0.1)
    log_probs = np.log(np.full((128, 2), 0.5, np.float32))
    samples = EvaluationSamples(
        images=np.zeros((128, 8, 8, 3), np.uint8),
        prompts=("a",) * 128,
        labels=labels.reshape(-1, 1).astype(np.int64),
        kl=np.full(128, 0.25),
        class_log_probs={NAME: log_probs},
        sample_ids=np.arange(128),
        log_ratio=np.full(128, 0.25),
    )
    monkeypatch.setattr(
        "ctrl_ray.comparison.results.measure_samples",
        lambda s, c: measured(values, labels, log_probs, log_ratio=s.log_ratio),
    )
    monkeypatch.setattr("ctrl_ray.evaluation.judging.load_oracle", lambda name: lambda image: 1.0)
    found = numbers_of(target(rng), samples, pre_trained=False, common=40)
    assert found["common_distance"]["images"] == 40 < found["distance"]["images"] == 128
    assert found["common_distance"]["worst"] < found["distance"]["worst"]
    assert found["accuracy"] == 0.5  # the oracle says 1 of each, which is 'high'
    assert found["kl"] == 0.25 and found["num_images"] == 128
    # log Z = log 1/2 of either class; each weight is log 1/2 − 1/4
    assert found["gap"] == pytest.approx(0.25, abs=0.02)
    assert (
        list(found["class_gaps"].values()) == pytest.approx([0.25, 0.25], abs=0.02) and found["joint_accuracy"] == 0.5
    )
    mean = over_seeds([found, {**found, "per_class": {NAME: {"accuracy": 0.75, "confusion": None}}}])
    assert mean["control_accuracies"] == {NAME: 0.625} and mean["class_gaps"] == pytest.approx(found["class_gaps"])


def test_a_sampler_whose_paths_have_no_density_has_no_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    labels, log_probs = np.arange(32) % 2, np.log(np.full((32, 2), 0.5, np.float32))
    samples = EvaluationSamples(
        images=np.zeros((32, 8, 8, 3), np.uint8),
        prompts=("a",) * 32,
        labels=labels.reshape(-1, 1).astype(np.int64),
        kl=np.full(32, np.nan),
        class_log_probs={NAME: log_probs},
        sample_ids=np.arange(32),
    )
    monkeypatch.setattr(
        "ctrl_ray.comparison.results.measure_samples", lambda s, c: measured(rng.normal(size=32), labels, log_probs)
    )
    monkeypatch.setattr("ctrl_ray.evaluation.judging.load_oracle", lambda name: lambda image: 1.0)
    found = numbers_of(target(rng), samples, pre_trained=False, common=32)
    assert found["gap"] is None and found["kl"] is None and found["too_wide"] is None
    assert over_seeds([found])["errors"]["kl"] is None
    assert over_seeds([found])["clip_score"] is None
    scores = np.linspace(0.2, 0.3, 32)
    scored = dataclasses.replace(target(rng), scorers={"clip_score": lambda images, prompts: scores})
    both = [numbers_of(scored, samples, pre_trained=False, common=32), {**found, "clip_score": 0.35}]
    assert both[0]["clip_score"] == pytest.approx(0.25) and both[0]["brisque"] is None
    assert over_seeds(both)["clip_score"] == pytest.approx(0.3) and over_seeds(both)["brisque"] is None


def numbers(accuracy: float, worst: float | None, error: float = 0.02) -> dict[str, Any]:
    found: dict[str, Any] = row("ctrl", worst=worst, accuracy=accuracy, errors={"accuracy": error})["test"]
    return found


def test_the_error_over_seeds_is_the_larger_of_images_and_seeds() -> None:
    alike = over_seeds([numbers(0.8, 2.0), numbers(0.8, 2.0), numbers(0.8, 3.0)])
    assert alike["accuracy"] == pytest.approx(0.8)
    assert alike["errors"]["accuracy"] == pytest.approx(0.02 / np.sqrt(3))
    apart = over_seeds([numbers(0.7, 2.0), numbers(0.9, 3.0)])
    assert apart["errors"]["accuracy"] == pytest.approx(np.std([0.7, 0.9], ddof=1) / np.sqrt(2))
    assert apart["distance"]["worst"] == 2.5 and apart["distance"]["range"] == [2.0, 3.0]
    assert apart["num_images"] == 256


def test_a_seed_without_a_number_leaves_none() -> None:
    found = over_seeds([numbers(0.8, 2.0), {**numbers(0.8, None), "gap": None}])
    assert found["gap"] is None and found["errors"]["gap"] is None
    assert found["distance"]["classes"]["small"] is None and found["distance"]["worst"] == 2.0


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([(3.0, 1.0), (2.0, 9.0), (2.5, 1.0)], 1),
        ([(2.0, 8.0), (2.0, 4.0), (2.0, 16.0)], 1),  # equal: the cheapest
        ([(2.0, 4.0), (2.0, 4.0)], 0),  # the nominal value comes first
        ([(None, 1.0), (50.0, 2.0)], 1),
        ([(None, 2.0), (None, 1.0)], 1),
    ],
)
def test_a_knob_has_the_value_of_the_smallest_worst_distance(rows: list[tuple[float | None, float]], best: int) -> None:
    assert choose([{"worst": worst, "cost": cost} for worst, cost in rows]) == best


def test_an_interval_stays_a_share() -> None:
    assert interval(0.5, 0.1) == (pytest.approx(0.304), pytest.approx(0.696))
    assert interval(0.99, 0.1) == (pytest.approx(0.794), 1.0)
    assert interval(0.5, None) is None


def met(*rows: dict[str, Any]) -> list[bool]:
    return [verdict["met"] for verdict in verdicts(rows)]


def test_ctrl_wins_where_no_method_within_the_bound_is_nearer() -> None:
    """The dear one is nearer, and does not count; the one at 3 × counts for the second bar alone."""
    plain, ctrl = row("plain", worst=20.0, accuracy=0.25), row("ctrl", worst=2.0, accuracy=0.9, ratio=1.05)
    assert met(plain, ctrl, row("dear", ratio=30.0, worst=1.0, accuracy=0.8)) == [True, True, True]
    assert met(plain, ctrl, row("near", ratio=3.0, worst=1.9, accuracy=0.8)) == [True, False, True]
    assert met(plain, ctrl, row("cheap", ratio=1.1, worst=1.9, accuracy=0.8)) == [False, False, True]


def test_an_accuracy_counts_while_fidelity_and_diversity_are_kept() -> None:
    """0.01 of the fidelity may go, and a tenth of the diversity."""
    plain = row("plain", worst=20.0, accuracy=0.25, prompt_fidelity=0.95, diversity=0.2)
    ctrl = row("ctrl", accuracy=0.8, prompt_fidelity=0.945, diversity=0.19)
    better: Any = {"ratio": 9.0, "accuracy": 0.95, "prompt_fidelity": 0.95, "diversity": 0.2}
    assert met(plain, ctrl, row("other", **better))[2] is False
    assert met(plain, ctrl, row("other", **{**better, "prompt_fidelity": 0.935}))[2] is True
    assert met(plain, ctrl, row("other", **{**better, "diversity": 0.179}))[2] is True
    assert met(plain, row("ctrl", accuracy=0.99, prompt_fidelity=0.9, diversity=0.2))[2] is False


def test_a_verdict_names_the_rival_with_numbers() -> None:
    plain, ctrl = row("plain", worst=20.0, accuracy=0.25), row("ctrl", worst=2.5, accuracy=0.80, ratio=1.02)
    near, far, accurate = verdicts([plain, ctrl, row("dps", ratio=3.5, worst=1.25, accuracy=0.81)])
    assert near["text"] == (
        "CTRL is at 2.50 noise floors in its worst class, at 1.02 × plain sampling; the nearest other method: pre-trained, at "
        "20.00 and 1.00 ×"
    )
    assert far["text"].endswith("nearer: dps, at 1.25 and 3.50 ×")
    assert accurate["text"] == "CTRL's accuracy is 0.800; higher is dps with 0.810, within two standard errors"


def test_what_cannot_be_judged_says_why() -> None:
    plain = row("plain", worst=20.0)
    assert verdicts([plain, row("dps")]) == []
    near, _, accurate = verdicts([plain, row("ctrl", worst=None, accuracy=None)])
    assert not near["met"] and "too few exact samples" in near["text"]
    assert not accurate["met"] and "no control has an oracle" in accurate["text"]
    dear, *_ = verdicts([plain, row("ctrl", ratio=1.5)])
    assert dear["text"] == "CTRL itself costs 1.50 × plain sampling"
