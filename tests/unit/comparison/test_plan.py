"""What a comparison runs: methods, values, seeds and numbers of images, as plain values."""

from __future__ import annotations

import dataclasses

import pytest

from ctrl_ray.comparison.methods import METHODS
from ctrl_ray.comparison.plan import DEAR, FULL, Counts, Plan, held_out_prompts, make_plan
from ctrl_ray.config.method import OPTIONS
from ctrl_ray.config.presets import preset
from ctrl_ray.errors import ConfigError
from ctrl_ray.offline.shapes import PROMPTS


def plan(*names: str, quick: bool = False, **options: object) -> Plan:
    return make_plan(names, num_steps=10, num_classes=4, quick=quick, **options)  # type: ignore[arg-type]


def test_the_full_comparison_has_every_method_with_three_values_of_each_knob() -> None:
    whole = plan()
    assert [method.name for method in whole.methods] == list(METHODS) and whole.methods[0].name == "plain"
    assert {len(method.values) for method in whole.methods if method.method.knob} == {3}
    assert whole.held_out and not whole.quick


@pytest.mark.parametrize(
    ("name", "dearest", "counts"),
    [
        ("plain", 1.0, Counts(256, 512)),
        ("ctrl", 1.0, Counts(256, 512)),
        ("dps", 1 + 2 + 5.9, Counts(256, 512)),
        ("best_of_n", 8 * 1.34, Counts(256, 512)),
        ("fk_steering", 8 * (1 + 3.4 * 2 / 10), Counts(256, 512)),  # asked once on its way, and at the end
        ("smc", 8 * 4.4, Counts(64, 128)),
        ("tds", 4 * 8.9, Counts(64, 128)),
        ("tfg", 1 + 2 + 16 * 5.9, Counts(64, 128)),
    ],
)
def test_methods_dearer_than_32_plain_samples_get_fewer_images(name: str, dearest: float, counts: Counts) -> None:
    (found,) = [method for method in plan().methods if method.name == name]
    assert max(map(found.cost, found.values)) == pytest.approx(dearest)
    assert (dearest > DEAR) == (counts.test == 128)
    assert found.counts == counts


def test_the_common_number_of_images_is_the_smallest() -> None:
    assert plan().common_test == 128
    assert plan("ctrl", "dps").common_test == 512


def test_a_quick_comparison_leaves_the_dearest_out_and_has_one_seed() -> None:
    quick = plan(quick=True)
    assert not {"tds", "tfg", "smc", "svdd"} & {method.name for method in quick.methods}
    assert all(max(map(method.cost, method.values)) <= DEAR for method in quick.methods)
    assert {len(method.values) for method in quick.methods if method.method.knob} == {3}
    assert {method.seeds for method in quick.methods if method.method.training} == {(0,)}
    assert not quick.held_out and quick.units < plan().units / 8


def test_a_dear_method_that_is_asked_for_is_there_in_a_quick_comparison_too() -> None:
    assert [method.name for method in plan("tds", quick=True).methods] == ["plain", "tds"]


def test_trained_methods_have_three_runs_and_others_none() -> None:
    seeds = {method.name: method.seeds for method in plan().methods}
    assert seeds["ctrl"] == seeds["draft"] == (0, 1, 2) and seeds["dps"] == ()
    assert {method.seeds for method in plan("ctrl", num_seeds=2).methods} == {(), (0, 1)}


def test_an_adapter_takes_the_place_of_the_runs_or_is_a_line_of_its_own() -> None:
    """Without a run of CTRL there is nothing to hold prompts back from."""
    found = plan("ctrl", adapters={"ctrl": "/a", "mine": "/b"}, held_out=True)
    assert [(m.name, m.method.title, m.adapters, m.seeds) for m in found.methods[1:]] == [
        ("ctrl", "CTRL", ("/a",), ()),
        ("mine", "mine", ("/b",), ()),
    ]
    assert not found.held_out
    assert plan("ctrl", quick=True, held_out=True).held_out


def test_every_class_has_enough_images_and_as_many_as_the_others() -> None:
    assert Counts(64, 128).rounded(8) == Counts(128, 128)
    assert Counts(64, 130).rounded(3) == Counts(66, 132)
    assert FULL.cheap.rounded(4) == FULL.cheap


def test_units_are_images_times_cost_at_the_dearest_value_that_may_be_chosen() -> None:
    (best,) = [method for method in plan().methods if method.name == "best_of_n"]
    assert best.units == pytest.approx(256 * 1.34 * (4 + 8 + 2) + 512 * 1.34 * 8)
    (ctrl,) = [method for method in plan().methods if method.name == "ctrl"]
    assert ctrl.units == 3 * (3 * 256 + 512)
    assert plan("ctrl").units == ctrl.units + 512


def test_the_table_names_every_method_with_its_values() -> None:
    lines = plan("dps").to_text().splitlines()
    assert lines[0].split()[:3] == ["method", "knob", "values"]
    assert lines[1].split() == ["pre-trained", "–", "–", "0", "512", "1", "1"]
    assert lines[2].split() == ["DPS", "scale", "0.1", "0.3", "0.03", "256", "512", "1", "8.9"]


@pytest.mark.parametrize(
    ("names", "adapters", "message"),
    [
        (("dpss",), {}, "--methods 'dpss' is not a method; did you mean 'dps'?"),
        (("dps", "dps"), {}, "names a method twice"),
        (
            ("dps",),
            {"tds": "/a"},
            "--adapters tds=… is the name of a method that trains nothing; expected one of ctrl, ",
        ),
    ],
)
def test_what_cannot_be_compared_is_one_error(names: tuple[str, ...], adapters: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        plan(*names, adapters=adapters)
    assert message in str(raised.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_knob_is_an_option_of_its_sampler_and_every_value_makes_one(name: str) -> None:
    """A method's settings differ from value to value, and nothing is trained with a sampler of its own."""
    method = METHODS[name]
    noised = [("size=/folder",)] if method.noised else []
    settings = [method.setting(value, *noised) for value in method.values]
    assert len(set(map(repr, settings))) == len(method.values)
    for setting, setting_value in zip(settings, method.values, strict=True):
        given = setting.method.given
        assert set(given) <= set(OPTIONS[setting.method.name])
        if method.training is not None:
            assert setting.method.name == "plain"
        elif method.knob:
            assert {*method.knob.split(" and "), *(["noised_classifier"] if noised else [])} <= set(given)
            assert all(given[option] == setting_value for option in method.knob.split(" and "))


def test_draft_is_the_presets_run_without_a_kl() -> None:
    """The gradient of one step beyond those of the reference, no bound on the drift; all else is CTRL's."""
    training = METHODS["draft"].training
    assert training is not None
    config = preset("shapes")
    draft = training(config)
    assert (draft.kl_coef, draft.estimator.name, draft.estimator.steps) == (0.0, "last_k", 2)
    assert config.sampler.reference_steps == 1
    assert (draft.estimator.max_drift, draft.estimator.final_max_drift) == (0.0, 0.0)
    assert dataclasses.replace(draft, kl_coef=config.kl_coef, estimator=config.estimator) == config


def test_six_of_the_24_prompts_are_held_back() -> None:
    """One of every colour, and all shapes among them; each colour and each shape is still trained."""
    held = held_out_prompts(PROMPTS)
    assert len(held) == len(set(held)) == 6 and set(held) < set(PROMPTS)
    kept = set(PROMPTS) - set(held)
    for word, count in ((1, 6), (2, 4)):
        assert len({prompt.split()[word] for prompt in held}) == len({prompt.split()[word] for prompt in kept}) == count
    with pytest.raises(ConfigError, match="2 prompts are too few"):
        held_out_prompts(["a", "b", "a"])


def test_cfg_fine_tuning_is_the_presets_task_by_another_method() -> None:
    """The same model, data, controls and sampler; the label's scale is the sampler's, and only at 1 does it cost one branch."""
    training = METHODS["cfg"].training
    assert training is not None
    config = preset("shapes")
    found = training(config)
    same = ("base_model", "data", "controls", "sampler", "lora", "kl_coef", "classifier")
    assert all(getattr(found, name) == getattr(config, name) for name in same)
    assert (found.training_method, found.adapter.kind) == ("cfg", "embedding")
    assert [METHODS["cfg"].setting(value).control_scale for value in METHODS["cfg"].values] == [1.0, 2.0, 4.0]
