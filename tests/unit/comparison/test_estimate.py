"""What a comparison will take: calls against what each algorithm says, and hours and dollars of work that is known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ctrl_ray import compare as command
from ctrl_ray.comparison.budgets.lines import make_budget_plan
from ctrl_ray.comparison.estimate import (
    STABLE_DIFFUSION,
    Hardware,
    RowFlops,
    estimate_plan,
    estimate_text,
    hardware,
    row_flops,
)
from ctrl_ray.comparison.methods import METHODS, NOMINAL_TRIES, Setting, ctrl_run, draft_run
from ctrl_ray.comparison.plan import make_plan
from ctrl_ray.comparison.training import run_config
from ctrl_ray.comparison.work import Rows, image_rows, training_rows
from ctrl_ray.config import MethodConfig, TrainConfig
from ctrl_ray.config.presets import as_cfg, preset
from ctrl_ray.errors import ConfigError
from ctrl_ray.planning.cost import AWS_MACHINES
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.build import load_policy_on

PAPER = preset("paper-compressibility")  # 50 steps, the last one the reference's, and two branches
RUN = run_config(PAPER, ctrl_run, Path("run"), seed=0)
"""Its run in a comparison, which has fewer samples before and after it."""


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({}, Rows(100, 0, 1, 0)),
        ({"name": "best_of_n", "num_particles": 4}, Rows(400, 0, 5, 0)),
        ({"name": "rejection"}, Rows(100 * NOMINAL_TRIES, 0, NOMINAL_TRIES + 1, 0)),
        ({"name": "mpgd"}, Rows(100, 0, 50, 49)),
        ({"name": "dps"}, Rows(100, 98, 50, 49)),
        ({"name": "tfg"}, Rows(100, 98, 4 * 4 * 49 + 1, 4 * 4 * 49)),
        ({"name": "smc", "num_particles": 4}, Rows(400, 0, 4 * 51 + 1, 0)),  # before every step, and at the end
        ({"name": "fk_steering", "num_particles": 4}, Rows(400, 0, 4 * 10 + 1, 0)),  # steps 5, 10 … 45, and the end
        ({"name": "svdd", "num_particles": 4}, Rows(2 + 4 * 98, 0, 4 * 50 + 1, 0)),
        ({"name": "tds", "num_particles": 4}, Rows(400, 4 * 98, 4 * 51 + 1, 4 * 49)),
    ],
    ids=lambda each: each.get("name", "plain") if isinstance(each, dict) else "",
)
def test_an_image_takes_what_the_algorithm_says(method: dict[str, object], expected: Rows) -> None:
    """With its own decode at the end; nothing is computed by the base model, which is nowhere."""
    assert image_rows(Setting(method=MethodConfig(**method)), PAPER) == expected  # type: ignore[arg-type]


def test_what_is_judged_has_a_kl_and_is_decoded_once_more() -> None:
    """A policy's KL takes the reference beside it where the policy has the step; the pre-trained model's is 0."""
    assert image_rows(Setting(), PAPER, adapter=True) == Rows(100, 0, 1, 0)
    assert image_rows(Setting(), PAPER, adapter=True, judged=True) == Rows(198, 0, 2, 0)
    assert image_rows(Setting(), PAPER, judged=True) == Rows(100, 0, 2, 0)


def test_a_scale_of_the_label_is_a_third_branch() -> None:
    assert image_rows(Setting(control_scale=4.0), PAPER, adapter=True) == Rows(150, 0, 1, 0)


def test_every_method_can_be_counted() -> None:
    """Also for two controls, and with classifiers of noised latents that nobody has fitted."""
    config = preset("paper-multi-task")
    plan = make_plan([], num_steps=50, num_classes=4)
    titles = [line.title for line in estimate_plan(plan, config)]
    assert titles[:2] == ["exact samples", METHODS["plain"].title] and len(titles) == len(METHODS) + 3
    assert "CTRL, prompts held back" in titles and titles[-1] == "pushes that begin later"


def test_training_is_its_updates_and_its_evaluations() -> None:
    """Of a trajectory 50 forwards, then policy and reference in 49 steps and the reference in the last; two branches."""
    updates, policy, pre_trained = 36 * 256, 198, 100
    evaluations = policy * (7 * 128 + 512) + pre_trained * (512 + 1.25 * 128)
    found = training_rows(PAPER)
    assert found.forwards == updates * 2 * (50 + 2 * 49 + 1) + evaluations
    assert found.backwards == updates * 2 * (2 * 49 + 1)
    judged = 7 * 128 + 512 + 512 + 1.25 * 128
    assert (found.decodes, found.decode_backwards) == (updates + 2 * judged, updates)


def test_cfg_fine_tuning_is_one_row_an_image() -> None:
    config = as_cfg(dataclasses.replace(PAPER, data="data.parquet"))
    found = training_rows(config)
    assert found.backwards == 400 * 64 and found.decode_backwards == 0
    assert config.micro_batch_size_per_worker == "auto", "64 images of 512 pixels would not fit"
    shallow = training_rows(draft_run(PAPER))
    assert shallow.backwards == 36 * 256 * 2 * (2 + 1), "the last trained step, and the reference's"


def test_a_line_is_all_that_is_drawn_of_a_method() -> None:
    """DPS: 256 images of each of three values, 512 of one, and twice 16 that are timed beside plain ones."""
    plan = make_plan(["dps", "ctrl"], num_steps=50, num_classes=4, num_seeds=2, held_out=False)
    exact, plain, ctrl, dps, later = estimate_plan(plan, PAPER)
    assert (dps.title, dps.image) == ("DPS", Rows(100, 98, 50, 49))
    images = 3 * 256 + 512
    assert dps.drawn == Rows(100 * images + 32 * 200, 98 * (images + 32), 51 * images + 32 * 51, 49 * (images + 32))
    assert dps.trained == Rows() and ctrl.trained == training_rows(RUN) * 2
    assert ctrl.drawn.forwards == 198 * 2 * images + 32 * 200, "an adapter of each seed"
    assert plain.drawn.forwards == 100 * 512 + 32 * 200
    assert exact.drawn.forwards == 100 * NOMINAL_TRIES * 4 * 512 / 4
    # from the first step on, and from the 11th, 21st, 31st and 41st; the last is the reference's
    assert later.drawn.backwards == 512 * 2 * (49 + 39 + 29 + 19 + 9) and later.drawn.forwards == 5 * 512 * 100


def test_hours_are_operations_over_the_rate_and_dollars_are_hours() -> None:
    flops = RowFlops(forward=1e12, backward=2e12, decode=4e12)
    on = Hardware(num_cards=2, denoiser=1e12, decoder=2e12, source="", dollars_per_hour=3.0)
    rows = Rows(forwards=3600, backwards=1800, decodes=900, decode_backwards=900)
    assert flops.denoiser(rows) == 7.2e15 and flops.decoder(rows) == 7.2e15
    assert on.hours(rows, flops) == (7200 + 3600) / 2 / 3600


def test_cards_have_a_rate_and_a_price_unless_they_are_given() -> None:
    a100 = next(machine for machine in AWS_MACHINES if machine.gpu == "A100")
    known = hardware(PAPER, card="A100", num_cards=4, teraflops=None, dollars_per_hour=None)
    assert known.denoiser == 0.19 * 312e12 and known.decoder == 0.19 * 156e12
    assert known.dollars_per_hour == a100.dollars_per_hour / 2
    given = hardware(PAPER, card="A100", num_cards=8, teraflops=100, dollars_per_hour=0.0)
    assert (given.denoiser, given.decoder, given.dollars_per_hour) == (1e14, 5e13, 0.0)
    with pytest.raises(ConfigError, match="--card 'B200' is not known; expected one of A10G, "):
        hardware(PAPER, card="B200", num_cards=1, teraflops=None, dollars_per_hour=None)


def test_the_operations_of_a_row_are_those_of_the_denoiser_itself(tiny_pipeline: Path) -> None:
    """By torch's own counter, of a pipeline on this machine."""
    backbone, latents = load_backbone(str(tiny_pipeline)), torch.zeros(1, 4, 4, 4, requires_grad=True)
    policy, decoder = load_policy_on(backbone, {"jpeg_size": 4}, lora=None).eval(), backbone.load_decoder(1)
    with FlopCounterMode(display=False) as forward:
        output = policy.denoiser(latents, 1, torch.zeros(1, 16, 16)).sample.sum()
    with FlopCounterMode(display=False) as backward:
        output.backward()
    with FlopCounterMode(display=False) as decode, torch.no_grad():
        decoder.decode(latents)
    found = row_flops(dataclasses.replace(PAPER, base_model=str(tiny_pipeline)))
    assert found.forward == pytest.approx(forward.get_total_flops(), rel=0.2)  # ours has LoRA
    assert found.backward == pytest.approx(backward.get_total_flops(), rel=0.3)
    assert found.decode == pytest.approx(decode.get_total_flops(), rel=0.05)


def test_what_is_neither_here_nor_known_is_said() -> None:
    assert row_flops(PAPER) is STABLE_DIFFUSION
    with pytest.raises(ConfigError, match=r"what someone/model computes is not known here.* give --base-model FOLDER"):
        row_flops(dataclasses.replace(PAPER, base_model="someone/model"))


def test_the_papers_dry_run_loads_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Methods, calls, hours and dollars, on a machine without the weights."""
    monkeypatch.setattr("ctrl_ray.planning.counts.build_policy", lambda *_, **__: pytest.fail("a policy was built"))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a network was asked"))
    arguments = ["--preset", "paper-compressibility", "--methods", "ctrl", "dps", "--held-out", "False", "--seeds", "1"]
    place = ["--output-dir", str(tmp_path / "new")]
    price = ["--num-cards", "2", "--teraflops", "50", "--dollars-per-hour", "6"]
    assert command.main([*arguments, *place, *price, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (ctrl,) = [line.split() for line in lines if line.startswith("CTRL ") and "M" in line]
    assert ctrl[1:5] == ["100", "0", "1", "0"] and ctrl[-4:-2] == ["4.79", "M"]
    rows = training_rows(RUN) + image_rows(Setting(), PAPER, adapter=True, judged=True) * (3 * 256 + 512)
    rows += image_rows(Setting(), PAPER) * 64
    hours = (STABLE_DIFFUSION.denoiser(rows) + 2 * STABLE_DIFFUSION.decoder(rows)) / 50e12 / 2 / 3600
    assert (float(ctrl[-2]), float(ctrl[-1])) == (pytest.approx(hours, abs=0.01), pytest.approx(6 * hours, abs=0.51))
    assert "         $6.00 an hour for all of them, as given" in lines
    assert not (tmp_path / "new").exists()


def test_cores_are_measured_and_cost_what_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrl_ray.comparison.estimate.measured_cpu_flops", lambda threads: threads * 1e10)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 5})
    found = hardware(preset("shapes"), card="A100", num_cards=4, teraflops=None, dollars_per_hour=None)
    assert (found.num_cards, found.denoiser, found.decoder) == (3, 3e9, 3e9)
    assert found.dollars_per_hour is None and "measured on this machine" in found.source
    plan = make_plan(["plain"], num_steps=10, num_classes=4)
    text = estimate_text(plan, preset("shapes"), found, STABLE_DIFFUSION)
    assert "on 3 cores" in text and "$" not in text
    given = hardware(preset("shapes"), card="A100", num_cards=4, teraflops=0.5, dollars_per_hour=0.25)
    assert (given.denoiser, given.dollars_per_hour) == (5e11, 0.25)


def test_a_line_of_seeds_that_trains_nothing_draws_with_the_pre_trained_model() -> None:
    """Classifier guidance over label budgets: a seed is another classifier there."""
    budgets = make_budget_plan(["classifier_guidance"], [64], num_steps=50, num_classes=4, num_seeds=2)
    exact, plain, *guided = estimate_plan(budgets.plan, PAPER)
    counts = budgets.plan.methods[1].counts
    images = 2 * (3 * counts.validation + counts.test)
    assert [line.drawn.forwards for line in guided] == [100 * images + 32 * 200] * 2
    assert all(line.trained == Rows() for line in (exact, plain, *guided))


def test_the_text_adds_up() -> None:
    on = Hardware(num_cards=1, denoiser=1e12, decoder=1e12, source="as given", dollars_per_hour=2.0, price_source="x")
    plan = make_plan(["plain"], num_steps=50, num_classes=4)
    text = estimate_text(plan, PAPER, on, RowFlops(forward=3600e12, backward=0, decode=0))
    rows = [line.split() for line in text.splitlines() if line.startswith(("exact", "pre-trained", "all "))]
    assert "2,419,200 PFLOP (counted)" in text  # 672,000 forwards
    hours = [float(row[-2].replace(",", "")) for row in rows]
    assert hours[-1] == pytest.approx(sum(hours[:-1])) == 614400 + 51200 + 6400
    assert [float(row[-1].replace(",", "")) for row in rows] == pytest.approx([2 * each for each in hours])


def test_models_and_data_of_the_users_own_take_the_presets_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_pipeline: Path
) -> None:
    asked: list[TrainConfig] = []
    monkeypatch.setattr("ctrl_ray.comparison.run.run_comparison", lambda question, *_: asked.append(question.config))
    monkeypatch.chdir(tmp_path)
    arguments = ["--preset", "paper-compressibility", "--base-model", str(tiny_pipeline), "--data", "mine.parquet"]
    assert command.main([*arguments, "--output-dir", str(tmp_path / "out")]) == 0
    (config,) = asked
    assert (config.base_model, config.data) == (str(tiny_pipeline), str(tmp_path / "mine.parquet"))
