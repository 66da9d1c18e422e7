"""What is fitted and trained on how many images, and which plans are errors."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from ctrl_ray.comparison.budgets.lines import FEWEST_UPDATES, LINES, NUM_SAMPLES, fitting_config, make_budget_plan
from ctrl_ray.config.presets import preset
from ctrl_ray.errors import ConfigError
from ctrl_ray.offline.shapes import PROMPTS


def plan(*budgets: int, methods: tuple[str, ...] = (), **changes: Any):
    return make_budget_plan(methods, budgets, num_steps=10, num_classes=4, **changes)


def test_every_line_is_run_at_every_budget_and_the_first_of_each_method_with_three_seeds() -> None:
    whole = plan(256, 64)
    assert whole.lines == tuple(LINES) and whole.budgets == (64, 256) and whole.seeds == (0, 1, 2)
    assert whole.plain.name == "plain" and whole.plain.seeds == ()
    assert len(whole.plan.methods) == 1 + 2 * len(LINES)
    assert whole.of("cfg", 256).name == "cfg-256" and whole.of("ctrl", 64).name == "ctrl-64"
    assert whole.of("cfg", 256).copies == 3 and whole.of("cfg-pairs", 256).copies == 1
    assert [name for name in whole.lines if whole.of(name, 64).seeds == (0, 1, 2)] == ["ctrl", "cfg", "guidance"]
    assert {len(method.values) for method in whole.plan.methods[1:]} == {3}
    assert "18 runs of training" in whole.to_text()  # five lines train a policy, two of them with every seed
    asked = plan(256, 64, num_seeds=2)
    assert {asked.of(name, 64).seeds for name in asked.lines} == {(0, 1)} and "20 runs of training" in asked.to_text()


def test_a_quick_plan_has_a_line_of_each_method_and_one_seed() -> None:
    quick = plan(64, 256, quick=True)
    assert [LINES[line].method for line in quick.lines] == ["ctrl", "cfg", "classifier_guidance"]
    assert quick.seeds == (0,) and quick.plan.units < plan(64, 256).plan.units / 5
    assert plan(64, methods=("cfg",), quick=True).lines == ("cfg", "cfg-pairs")


def test_without_an_oracle_no_samples_of_the_model_can_be_labelled() -> None:
    assert "ctrl-samples" not in plan(64, has_oracle=False).lines


@pytest.mark.parametrize(
    ("budgets", "methods", "message"),
    [
        ((64, 10), (), "20 at least"),
        ((64, 64), (), "different numbers"),
        ((64,), ("dps",), "--methods 'dps' is not a method that --label-budgets compares"),
    ],
)
def test_what_cannot_be_run_is_an_error(budgets: tuple[int, ...], methods: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(*budgets, methods=methods)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", LINES)
def test_a_line_fits_on_exactly_the_budget(name: str) -> None:
    """No shipped classifier, no samples of the model but where the line says so; prompts only where the line has them."""
    line = LINES[name]
    found = fitting_config(preset("shapes"), line, 64, 5)
    assert (found.classifier.max_images, found.seed) == (64, 5)
    assert found.classifier.num_pipeline_samples == (NUM_SAMPLES if name == "ctrl-samples" else 0)
    assert [control.classifier for control in found.controls.values()] == [None]
    assert found.classifier.ignore_prompts != line.with_prompts
    assert found.classifier.prompt_conditional == (name in ("ctrl-prompts", "guidance-prompts"))
    same = ("base_model", "data", "sampler", "lora", "kl_coef", "num_updates")
    assert all(getattr(found, field) == getattr(preset("shapes"), field) for field in same)


def test_few_images_are_seen_more_often() -> None:
    """At least FEWEST_UPDATES updates: 51 of 64 images are one batch; of 6000 the preset's epochs are more than that."""
    config = preset("shapes")
    assert fitting_config(config, LINES["ctrl"], 64, 0).classifier.epochs == FEWEST_UPDATES
    assert fitting_config(config, LINES["ctrl"], 6000, 0).classifier.epochs == config.classifier.epochs


def test_a_budget_above_the_drawn_images_draws_more() -> None:
    config = preset("shapes")
    assert fitting_config(config, LINES["cfg"], 8192, 0).num_drawn_images == 8192
    stored = dataclasses.replace(config, data="/data.parquet")
    assert fitting_config(stored, LINES["cfg"], 8192, 0).num_drawn_images == config.num_drawn_images


def test_both_splits_of_the_prompts_are_known() -> None:
    """The preset's prompts do not come from the labelled images, so a run on pairs has them all."""
    from ctrl_ray.offline.prompts import training_prompts

    found = fitting_config(preset("shapes"), LINES["cfg-pairs"], 64, 0)
    assert set(training_prompts(found)) == set(PROMPTS)
