"""An adapter against exact samples of its target, from the options to the files, with samplers whose law is known."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from ctrl_ray import verify
from ctrl_ray.config import ControlConfig, SamplerConfig
from ctrl_ray.distributed.batches import evaluation_batch
from ctrl_ray.distributed.sampling import SamplingJob
from ctrl_ray.errors import ConfigError
from ctrl_ray.evaluation.samples import EvaluationSamples
from ctrl_ray.policy.adapter import ADAPTER_FILE, AdapterInfo
from ctrl_ray.verification import pipeline
from ctrl_ray.verification.pictures import MAX_PANELS, plot_overview, plot_statistic, shown_classes
from ctrl_ray.verification.pipeline import Question, shortages, verify_pipeline
from ctrl_ray.verification.rejection import Pool
from ctrl_ray.verification.target import joint_classes
from tests.unit.verification.samples import (
    HUE,
    LEVEL,
    evaluation_samples,
    hue_log_probs,
    level_log_probs,
    without_images,
)

CONTROLS = {"hue": HUE, "level": dataclasses.replace(LEVEL, guidance_strength=1.0)}
_CLASSIFIERS = {"hue": hue_log_probs, "level": level_log_probs}
PROMPTS = ("a", "b")
_TABLE = (np.arange(500) + 0.5) / 500


def _adapter(folder: Path, controls: dict[str, ControlConfig], **training: Any) -> Path:
    info = AdapterInfo(
        base_model="shapes",
        base_revision=None,
        base_sha256="0",
        controls=controls,
        sampler=SamplerConfig(num_steps=2),
        scheduler={},
        lora=None,
        training={"kl_coef": 1.0, **training},
    )
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / ADAPTER_FILE).write_text(info.to_json())
    for name in controls:
        (folder / "classifier" / name).mkdir(parents=True)
    return folder / "adapter"


def _sampler(quality: str, jobs: list[SamplingJob]) -> Callable[..., EvaluationSamples]:
    """Uniform strengths without a control; with one, "exact" samples of the target, or "untrained" ones. The log-ratio is that
    of an exact policy, so the certificate's gap is 0, or that of one that changes nothing."""

    def sample_policy(job: SamplingJob, rewards: Any, scaling: Any) -> EvaluationSamples:
        jobs.append(job)
        batch = evaluation_batch(job.sample_ids, job.prompts, job.controls, tuple(job.controls))
        labels = batch.labels.numpy()
        rng = np.random.default_rng(job.sample_ids[0])
        weights = np.ones((len(labels), len(_TABLE)))
        if not job.reference and quality == "exact":
            for column, (name, control) in enumerate(job.controls.items()):
                weights *= np.exp(control.guidance_strength * _CLASSIFIERS[name](_TABLE).T[labels[:, column]])
        cumulative = weights.cumsum(axis=1)
        drawn = [np.searchsorted(row, rng.uniform(0, row[-1])) for row in cumulative]
        strength = _TABLE[np.minimum(drawn, len(_TABLE) - 1)]
        log_probs = {name: _CLASSIFIERS[name](strength) for name in job.controls}
        log_ratio = np.log(weights[np.arange(len(labels)), drawn]) - np.log(weights.mean(axis=1))
        samples = evaluation_samples(strength, labels, log_probs, rng, log_ratio=log_ratio if job.with_kl else None)
        return dataclasses.replace(samples, prompts=batch.prompts, sample_ids=np.array(job.sample_ids))

    return sample_policy


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[SamplingJob]:
    monkeypatch.setattr(pipeline, "connected", nullcontext)
    monkeypatch.setattr(pipeline, "check_adapter", lambda folder, info: None)  # they have no weights
    return []


def _verify(folder: Path, question: Question) -> dict[str, Any]:
    said: list[str] = []
    results = verify_pipeline(folder, question, said.append)
    assert said[0].startswith(f"{len(results['classes'])} joint classes × {question.num_samples} fine-tuned samples")
    return results


@pytest.mark.full
def test_an_exact_adapter_meets_the_bar_in_every_joint_class_and_an_untrained_one_in_none(
    jobs: list[SamplingJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: dict[str, Figure]
) -> None:
    """Two controls at exponents 2 and 1: six joint classes, each with its certificate."""
    question = Question(adapter=str(_adapter(tmp_path / "run", CONTROLS)), num_samples=96, prompts=PROMPTS)
    found = {}
    for quality in ("exact", "untrained"):
        monkeypatch.setattr("ctrl_ray.verification.drawing.sample_policy", _sampler(quality, jobs))
        found[quality] = _verify(tmp_path / quality, question)
    exact, untrained = found["exact"], found["untrained"]
    assert exact["exponents"] == {"hue": 2.0, "level": 1.0} and exact["bar"]["distances"] == [
        ["hue", "Wasserstein"],
        ["log p(level)", "Kolmogorov–Smirnov"],
    ]
    assert len(exact["classes"]) == 6 and exact["bar"]["met"] and not untrained["bar"]["met"]
    assert exact["certificate"]["gap"] == pytest.approx(0, abs=4 * exact["certificate"]["gap_standard_error"])
    for mine, other in zip(exact["classes"], untrained["classes"], strict=True):
        assert mine["shortage"] is None and mine["bar_ratio"] < other["bar_ratio"]
        assert mine["certificate"]["ess"] > 0.99 > other["certificate"]["ess"]
        assert mine["certificate"]["gap"] < 0.2 < other["certificate"]["gap"]
        assert mine["acceptance"] == pytest.approx(np.exp(mine["certificate"]["log_z"]), rel=0.3)
    assert json.loads((tmp_path / "exact" / "results.json").read_text()) == exact
    names = {"verification.png", "rejection_hue.png", "rejection_level.png"}
    assert set(figures) == names and {Path(path).name for path in exact["pictures"]} == names
    sizes = [row["distances"][0]["num_samples"] for row in exact["classes"]]
    start = "all of 6 joint classes are within 3 noise floors of exact samples of the target"
    assert f"{start}, with {min(sizes)} to {max(sizes)} on each side (the farthest: " in exact["headline"]


@pytest.mark.parametrize("use_gpu", [False, True])
def test_one_control_from_the_command_line(
    jobs: list[SamplingJob],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    use_gpu: bool,
) -> None:
    """No --pipeline; the certificate is beside the distances; a GPU is used in the run's precision where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: use_gpu)
    monkeypatch.setattr(pipeline, "_draw_pictures", lambda *_: [])
    scalings = []
    draw = _sampler("exact", jobs)
    monkeypatch.setattr(
        "ctrl_ray.verification.drawing.sample_policy",
        lambda job, rewards, scaling: (
            scalings.append((rewards.precision, scaling.use_gpu)),
            draw(job, rewards, scaling),
        )[1],
    )
    monkeypatch.setattr(pipeline, "run_prompts", lambda adapter, base_model: PROMPTS)
    adapter = _adapter(
        tmp_path, {"hue": dataclasses.replace(HUE, oracle=None)}, precision="bf16", evaluation_batch_size=64
    )
    status = verify.main(["--adapter", str(adapter), "--num-samples", "32", "--output-dir", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert status == 0
    assert printed.strip().splitlines()[0].startswith(f"{adapter}: all of 2 joint classes are within 3 noise floors")
    for name in ("grey", "colourful"):
        block = printed[printed.index(f"\n{name}: ") :]
        assert block.splitlines()[2].startswith("  gap ") and "effective sample size 99." in block.splitlines()[2]
        assert "log p(hue)" in block and "features" in block and "jpeg_size" in block
    assert "Kolmogorov–Smirnov distance of log p(hue) at most 3 × the noise floor in every class: yes" in printed
    precision = "bf16" if use_gpu else "fp32"
    assert set(scalings) == {(precision, use_gpu)} and {job.precision for job in jobs} == {precision}
    assert [job.with_kl for job in jobs] == [not job.reference for job in jobs]
    assert {job.batch_size for job in jobs} == {64}


def test_a_class_with_too_few_exact_samples_is_named_after_the_rest_is_written(
    jobs: list[SamplingJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every class at an exponent of 400 in a pool of at most 64: exit 2, and what was drawn is kept."""
    control = dataclasses.replace(HUE, guidance_strength=400.0, oracle=None)
    monkeypatch.setattr("ctrl_ray.verification.drawing.sample_policy", _sampler("untrained", jobs))
    monkeypatch.setattr(pipeline, "run_prompts", lambda adapter, base_model: PROMPTS)
    monkeypatch.setattr(pipeline, "_draw_pictures", lambda *_: [])
    adapter, out = _adapter(tmp_path, {"hue": control}), tmp_path / "out"
    arguments = ["--adapter", str(adapter), "--num-samples", "32", "--max-pool-samples", "64", "--json"]
    assert verify.main([*arguments, "--output-dir", str(out)]) == 2
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert results == json.loads((out / "results.json").read_text())
    assert "could not be compared" in results["headline"] and not results["bar"]["met"]
    assert "error: class 'grey': " in printed.err and "--max-pool-samples" in printed.err
    assert all(row["distances"] == [] and row["shortage"] for row in results["classes"])
    assert results["classes"][0]["certificate"]["too_wide"]
    drawn = len(jobs)
    assert verify.main([*arguments, "--output-dir", str(out)]) == 2 and len(jobs) == drawn
    many = {"classes": [{"shortage": f"class {index}"} for index in range(5)]}
    assert str(shortages(many)).startswith("class 0; class 1; class 2; and 2 more classes. Give --max-pool-samples")
    assert shortages({"classes": [{"shortage": None}]}) is None


def test_prompts_are_spread_where_there_are_too_many(tmp_path: Path, jobs: list[SamplingJob]) -> None:
    assert pipeline._spread(tuple("abcdefgh"), 4) == ("a", "c", "e", "g")
    assert pipeline._spread(("a", "b", "a"), 4) == ("a", "b")
    with pytest.raises(ConfigError, match="kl_coef"):
        verify_pipeline(
            tmp_path / "out",
            Question(adapter=str(_adapter(tmp_path, CONTROLS, kl_coef=None)), num_samples=16),
            lambda text: None,
        )
    assert jobs == []  # refused before anything is drawn


def test_the_picture_of_a_statistic_shows_three_laws(tmp_path: Path, figures: dict[str, Figure]) -> None:
    """Each with its prompts as often as in the distances: 20 of a, 7 of b, none of c. A class without exact samples has no
    bars, and all of the others."""
    rng = np.random.default_rng(4)
    strength = rng.uniform(size=300)
    log_probs = {"hue": hue_log_probs(strength)}
    samples = without_images(strength, np.zeros(300), log_probs, prompts=("a", "b", "c"))
    tuned = without_images(strength[:60], np.zeros(60), {"hue": log_probs["hue"][:60]}, prompts=("a", "b", "c"))
    prompts = np.array(samples.prompts)
    exact = np.concatenate([np.flatnonzero(prompts == "a")[:50], np.flatnonzero(prompts == "b")[:15]])
    exact = np.append(exact, np.flatnonzero(prompts == "c")[0])
    accepted = np.zeros((2, 300), dtype=bool)
    accepted[0, exact] = True
    pool = Pool(samples, accepted, np.array([0.5, 0.0]))
    classes, bar = joint_classes({"hue": HUE}), ("hue", "Wasserstein")
    samples.values["hue"] = strength
    tuned.values["hue"] = strength[:60]
    plot_statistic(tmp_path / "s.png", pool, tuned, ["hue"], classes, bar, "strength / 1", _results([1.0, None]))
    grey, colourful = figures["s.png"].axes
    outline, *bars, tuned_outline = grey.patches
    edges = np.array([*(each.get_x() for each in bars), bars[-1].get_x() + bars[-1].get_width()])
    size = {"a": 20, "b": 7, "c": 0}
    for found, rows, counts in (
        (outline.get_xy()[1:-1:2, 1], np.arange(300), {"a": 100, "b": 100, "c": 100}),
        ([each.get_height() for each in bars], exact, {"a": 50, "b": 15, "c": 1}),
        (tuned_outline.get_xy()[1:-1:2, 1], np.arange(60), {"a": 20, "b": 20, "c": 20}),
    ):
        weights = [size[prompt] / counts[prompt] for prompt in prompts[rows]]
        expected = np.histogram(strength[rows], edges, weights=weights, density=True)[0]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    titles = [axis.get_title(loc="left") for axis in (grey, colourful)]
    assert titles == ["grey: 1.0 noise floors", "colourful: not compared"]
    (of_all,) = colourful.patches  # nobody was asked for it either
    np.testing.assert_allclose(of_all.get_xy()[1:-1:2, 1], np.histogram(strength, edges, density=True)[0], atol=1e-6)


def _results(ratios: list[float | None]) -> dict[str, Any]:
    distances = [
        {"statistic": "hue", "distance": "Wasserstein", "ratio": ratio, "num_samples": 10, "num_prompts": 1}
        for ratio in ratios
    ]
    return {
        "bar": {"max_ratio": 3.0},
        "classes": [
            {
                "name": f"class {index}",
                "distances": [distance],
                "bar_ratio": distance["ratio"],
                "certificate": {"gap": 0.1 * index, "gap_standard_error": 0.01},
            }
            for index, distance in enumerate(distances)
        ],
    }


def test_the_overview_shows_ratios_and_gaps_of_every_class_or_of_the_farthest(
    tmp_path: Path, figures: dict[str, Figure]
) -> None:
    plot_overview(tmp_path / "few.png", _results([1.0, 4.25]))
    table, gaps = figures["few.png"].axes
    assert [text.get_text() for text in table.texts] == ["1.0", "4.2"]
    assert [text.get_fontweight() for text in table.texts] == ["normal", "bold"]  # beyond the bar
    assert [bar.get_width() for bar in gaps.patches] == pytest.approx([0.0, 0.1])
    assert [label.get_text() for label in table.get_yticklabels()] == ["class 0", "class 1"]
    many = _results([float(index) for index in range(30)])
    many["classes"][0]["bar_ratio"] = None  # not compared, or infinitely far
    assert shown_classes(many) == [0, *range(31 - MAX_PANELS, 30)]
