"""Judging by an oracle: who is right, what is left out, and that the reward classifier is never the judge."""

import json
import math

import numpy as np
import pytest

from ctrl_ray.config import ControlConfig
from ctrl_ray.errors import DataError
from ctrl_ray.evaluation.judging import evaluation_row, judge, summary_of
from ctrl_ray.evaluation.metric_names import EVALUATION_METRICS, METRICS, check_names, definition
from tests.unit.evaluation.helpers import CONTROL, brightness, flat_samples

CONTROLS = {"light": CONTROL}
ORACLES = {"light": brightness}
# Brightness 10, 63 | 64, 100 | 128, 200: true classes 0 0 1 1 2 2.
VALUES, TRUE = [10, 63, 64, 100, 128, 200], [0, 0, 1, 1, 2, 2]


def test_accuracy_confusion_and_quartiles_by_hand():
    judged = judge(flat_samples(VALUES, [0, 1, 1, 1, 2, 0]), CONTROLS, oracles=ORACLES)
    control = judged["controls"]["light"]
    assert judged["accuracy"] == judged["joint_accuracy"] == 4 / 6
    assert control["confusion"] == [[1, 0, 1], [1, 2, 0], [0, 0, 1]]
    # F1: 2·1/(2+2), 2·2/(3+2), 2·1/(1+2)
    assert judged["macro_f1"] == pytest.approx((0.5 + 0.8 + 2 / 3) / 3)
    assert [row["median"] for row in control["values"]] == [105.0, 64.0, 128.0]
    assert judged["kl"] == 2.5
    assert judged["num_samples"] == 6
    assert judged["standard_errors"]["kl"] == pytest.approx(math.sqrt(3.5 / 6))


def test_an_oracle_of_image_and_prompt_judges_each_sample_with_its_prompt():
    """Under 'a red circle' (every second sample) the brightness counts 60 less: 10, 3 | 64, 40 | 128, 140."""

    def by_prompt(image, prompt):
        return brightness(image) - 60 * (prompt == "a red circle")

    judged = judge(flat_samples(VALUES, [0, 0, 1, 0, 2, 2]), CONTROLS, oracles={"light": by_prompt})
    assert judged["accuracy"] == 1.0
    blind = judge(flat_samples(VALUES, [0, 0, 1, 0, 2, 2]), CONTROLS, oracles=ORACLES)
    assert blind["accuracy"] == 5 / 6


def test_null_labels_do_not_count_for_accuracy():
    judged = judge(flat_samples(VALUES, [0, 3, 1, 3, 3, 0]), CONTROLS, oracles=ORACLES)
    assert judged["controls"]["light"]["num_samples"] == 3
    assert judged["accuracy"] == pytest.approx(2 / 3)


def test_belief_gap_and_calibration_compare_with_the_truth():
    # The classifier says 0.9 for the class asked for, always; the truth is 1 of 2 right, twice.
    log_probs = np.log(np.full((4, 3), 0.05))
    labels = [0, 1, 1, 0]
    log_probs[np.arange(4), labels] = np.log(0.9)
    judged = judge(flat_samples([10, 10, 100, 100], labels, log_probs=log_probs), CONTROLS, oracles=ORACLES)
    assert judged["belief_gap"] == pytest.approx(0.4)
    [only] = judged["controls"]["light"]["calibration"]
    assert (only["believed"], only["measured"], only["count"]) == (pytest.approx(0.9), 0.5, 4)


def test_the_reward_classifier_never_judges():
    control = ControlConfig(classes=("no", "yes"))
    log_probs = np.log(np.full((4, 2), 0.5))
    judged = judge(flat_samples([0, 0, 9, 9], [0, 1, 0, 1], log_probs=log_probs), {"light": control})
    assert judged["accuracy"] is None
    assert judged["belief_gap"] is None
    assert judged["controls"]["light"]["believed_accuracy"] == pytest.approx(0.5)
    assert any("no oracle and no held-out judge" in note for note in judged["notes"])
    held_out = {"light": lambda images, prompts: (images[:, 0, 0, 0] > 5).astype(int)}
    assert judge(flat_samples([0, 0, 9, 9], [0, 1, 1, 1]), {"light": control}, judges=held_out)["accuracy"] == 0.75


def test_diversity_groups_by_label_or_by_truth():
    samples = flat_samples([0, 51, 255, 204], [0, 1, 0, 1])
    by_label = judge(samples, CONTROLS, oracles=ORACLES, by="label")
    by_truth = judge(samples, CONTROLS, oracles=ORACLES, by="oracle")
    assert by_label["diversity"] == pytest.approx((255 + 153) / 2 / 255)  # 0 with 255, 51 with 204
    assert by_truth["diversity"] == pytest.approx((51 + 51) / 2 / 255)  # 0 with 51, 255 with 204


def test_several_controls_are_averaged_and_joined():
    second = ControlConfig(thresholds=(100.0,), oracle="jpeg_size")
    samples = flat_samples(VALUES, TRUE)
    labels = np.stack([TRUE, [0, 0, 0, 0, 0, 2]], axis=1).astype(np.int64)  # second: true 0 0 0 1 1 1, last one null
    both = {"light": CONTROL, "bright": second}
    pair = type(samples)(
        images=samples.images, prompts=samples.prompts, labels=labels, kl=samples.kl, sample_ids=samples.sample_ids
    )
    judged = judge(pair, both, oracles={"light": brightness, "bright": brightness})
    assert judged["accuracy"] == pytest.approx((1 + 3 / 5) / 2)
    assert judged["joint_accuracy"] == pytest.approx(4 / 6)


def test_what_was_not_measured_is_none_and_said():
    samples = flat_samples(VALUES, TRUE)
    blind = type(samples)(
        images=samples.images,
        prompts=samples.prompts,
        labels=samples.labels,
        kl=np.full(6, np.nan),
        sample_ids=samples.sample_ids,
    )
    judged = judge(blind, CONTROLS, oracles=ORACLES)
    assert judged["kl"] is None
    assert judged["prompt_fidelity"] is None
    assert {note.partition(":")[0] for note in judged["notes"]} == {"kl", "prompt_fidelity"}


def test_fidelity_is_the_mean_score_and_the_summary_is_strict_json():
    scores = np.array([1, 1, 1, 0, 1, 1], dtype=float)
    judged = judge(flat_samples(VALUES, TRUE), CONTROLS, oracles=ORACLES, fidelity=lambda images, prompts: scores)
    assert judged["prompt_fidelity"] == pytest.approx(5 / 6)
    summary = json.loads(json.dumps(summary_of(judged), allow_nan=False))
    assert set(EVALUATION_METRICS) <= set(summary)
    assert "per_sample" not in summary


def test_scores_are_means_over_the_samples_that_have_one():
    """And a judge of prompts that is one of the scorers is asked once."""
    asked = []

    def clip(images, prompts):
        asked.append(prompts)
        return np.array([0.2, 0.3, 0.1, 0.2, 0.4, 0.3])

    brisque = lambda images, prompts: np.array([10.0, np.nan, 20.0, 30.0, np.nan, 40.0])  # noqa: E731
    samples = flat_samples(VALUES, TRUE)
    judged = judge(samples, CONTROLS, oracles=ORACLES, fidelity=clip, scorers={"clip_score": clip, "brisque": brisque})
    assert judged["clip_score"] == judged["prompt_fidelity"] == pytest.approx(0.25) and asked == [samples.prompts]
    assert judged["brisque"] == pytest.approx(25)
    assert judged["standard_errors"]["brisque"] == pytest.approx(math.sqrt(500 / 3 / 4))
    assert judged["notes"] == ["brisque: 2 of 6 samples have none and are left out"]
    row = evaluation_row(judged)
    check_names(row)
    assert row["clip_score"] == pytest.approx(0.25) and "per_sample" not in summary_of(judged)
    assert judge(samples, CONTROLS, oracles=ORACLES)["brisque"] is None


@pytest.mark.parametrize(
    ("labels", "controls", "message"),
    [
        ([0, 1, 2, 4, 0, 0], CONTROLS, r"span 0..4; expected 0..2, or 3 for none"),
        (TRUE, {**CONTROLS, "more": CONTROL}, r"1 columns for 2 controls"),
    ],
)
def test_labels_that_do_not_fit_the_controls(labels, controls, message):
    with pytest.raises(DataError, match=message):
        judge(flat_samples(VALUES, labels), controls, oracles=ORACLES)


def test_an_oracle_without_thresholds_must_name_a_class():
    control = ControlConfig(classes=("no", "yes"), oracle="jpeg_size")
    with pytest.raises(DataError, match=r"gave 7\.0 for sample 1; expected a class in 0\.\.1"):
        judge(flat_samples([0, 7], [0, 1]), {"light": control}, oracles={"light": brightness})


def test_evaluation_row_holds_only_defined_names():
    row = evaluation_row(judge(flat_samples(VALUES, TRUE), CONTROLS, oracles=ORACLES))
    check_names(row)
    assert row["accuracy/light"] == row["accuracy"] == 1.0
    assert "prompt_fidelity" not in row


@pytest.mark.parametrize("name", ["accurracy", "log_prob", "reward/jpeg_size", "accuracy/", "log_prob/*"])
def test_an_undefined_metric_fails(name):
    with pytest.raises(ValueError, match="not defined"):
        definition(name)


def test_definitions_are_found_by_family_and_differ():
    assert definition("log_prob/jpeg_size") is METRICS["log_prob/*"]
    assert {metric.unit for metric in METRICS.values()} == {"1", "nats", "s", "1/s"}
    assert all(metric.unit == "s" for name, metric in METRICS.items() if name.endswith("_s") and "_per_" not in name)
    meanings = [metric.meaning for metric in METRICS.values()]
    assert len(set(meanings)) == len(meanings)
    assert {name for name, metric in METRICS.items() if metric.higher_is_better} == {
        *(
            "reward",
            "log_prob/*",
            "samples_per_s",
            "accuracy",
            "accuracy/*",
            "joint_accuracy",
            "macro_f1",
            "macro_f1/*",
        ),
        *("prompt_fidelity", "clip_score", "diversity", "objective", "objective/*", "ess", "ess/*"),
    }
