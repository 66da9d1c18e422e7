"""Every sweep file fits its preset, and what a file gets wrong is said before Ray starts, with the nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from ctrl_ray.config import EvaluationConfig
from ctrl_ray.config.presets import preset
from ctrl_ray.errors import ConfigError
from ctrl_ray.tuning.space import Space, base_of, check_request, check_space, load_space, some_values

FILES = sorted((Path(__file__).resolve().parents[2] / "tune_spaces").glob("*.py"))
STRENGTH = "controls.jpeg_size.guidance_strength"


def _check(values: dict, **others: object) -> None:
    check_space(Space(name="mine", values=values, **others), preset("shapes"))


def test_there_are_sweeps() -> None:
    assert {file.name for file in FILES} == {"guidance_grid.py", "kl_guidance.py", "optimizer.py", "pareto.py"}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_sweep_fits_its_preset(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("a sweep is checked before Ray starts"))
    space = load_space(file)
    base = check_space(space, base_of(space))
    assert space.knobs
    assert base.num_updates == space.constants.get("num_updates", base.num_updates)


def test_kl_guidance_spans_the_ratios_and_has_pairs() -> None:
    space = load_space(next(file for file in FILES if file.stem == "kl_guidance"))
    ratios = sorted(round(point[STRENGTH] / point["kl_coef"], 9) for point in space.points)
    assert ratios == [0.3, 1.0, 1.0, 3.0, 3.0, 6.0, 6.0, 10.0]
    low, high = ({path: getattr(space.knobs[path], end) for path in space.knobs} for end in ("lower", "upper"))
    assert low[STRENGTH] / high["kl_coef"] == pytest.approx(0.3)
    assert high[STRENGTH] / low["kl_coef"] == pytest.approx(10)
    assert all(low[path] <= point[path] <= high[path] for point in space.points for path in point)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kl_coeff": tune.uniform(1, 2)}, r"'kl_coeff' does not exist; did you mean 'kl_coef'\?"),
        ({"guidance_strength": tune.uniform(1, 2)}, f"did you mean '{STRENGTH}'"),
        ({STRENGTH: tune.choice(["high"])}, r"guidance_strength is 'high' \(str\); expected a number"),
        ({"lora.rank": tune.uniform(1, 8)}, r"lora.rank is .* \(float\); expected an integer"),
        ({"lora.rank": tune.randint(0, 4)}, "lora.rank is 0; expected at least 1"),
        ({"kl_coef": tune.grid_search([1.0, -1.0])}, r"kl_coef is -1.0; expected .*\(asked for: kl_coef = -1.0\)"),
        ({"scaling.num_workers": tune.choice([1, 2])}, "cannot differ between trials"),
        ({"kl_coef": 1.0}, "nothing varies"),
        ({"kl_coef": tune.uniform(1, 2), "output_dir": "x"}, "give --output-dir"),
        ({"kl_coef": tune.uniform(1, 2), "lora.rank": "8"}, r"lora.rank is '8' \(str\); expected an integer"),
    ],
)
def test_a_wrong_setting(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _check(values)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"metric": ("acuracy",)}, r"'acuracy' is logged by no trial; did you mean 'accuracy'\?"),
        ({"mode": ("up",)}, "expected 'max' or 'min'"),
        ({"metric": ("accuracy", "kl"), "mode": ("max", "min")}, "needs a search"),
        ({"points": ({"lora.rank": 4},)}, "which does not vary"),
        ({"metric": ("prompt_fidelity",), "scheduler": ASHAScheduler}, "at a trial's end only"),
        (
            {"scheduler": lambda: ASHAScheduler(time_attr="updates_done", max_t=55)},
            r"max_t = 55, before .*make max_t larger",
        ),
    ],
)
def test_a_wrong_goal(others: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _check({"kl_coef": tune.uniform(1, 2)}, **others)


def test_the_gap_is_a_goal_where_there_is_a_target() -> None:
    values: dict = {"optimizer.learning_rate": tune.loguniform(1e-3, 1e-2)}
    _check(values, metric=("gap",), mode=("min",))
    _check(values, metric=("gap",), mode=("min",), scheduler=lambda: ASHAScheduler(time_attr="updates_done", max_t=999))
    with pytest.raises(ConfigError, match="'gap' is logged by no trial, because with latent_reduction 'mean'"):
        _check({**values, "latent_reduction": "mean"}, metric=("gap",), mode=("min",))


def test_a_file_that_lacks_something(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    with pytest.raises(ConfigError, match=r"mine.py does not exist"):
        load_space(file)
    for text, message in (
        ("MODE = 'max'\ndef space(): return {}", "lacks METRIC"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("METRIC, MODE, space = 'kl', 'min', {}", "space is {}; expected a function"),
        ("PRESET, METRIC, MODE = 3, 'kl', 'min'\ndef space(): return {}", "PRESET is 3"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_space(file)
    file.write_text("PRESET, METRIC, MODE = 'run/config.json', 'kl', 'min'\ndef space(): return {}")
    with pytest.raises(ConfigError, match=rf"PRESET {tmp_path}/run/config.json does not exist"):
        base_of(load_space(file))


def test_both_ends_of_a_range_are_tried() -> None:
    assert {1, 3} <= set(some_values(tune.randint(1, 4))) <= {1, 2, 3}
    assert {0.5, 2.0} <= set(some_values(tune.loguniform(0.5, 2.0)))
    assert some_values(tune.choice(["a", "b"])) == ["a", "b"]
    assert some_values(tune.sample_from(lambda config: 1)) == []


def test_an_evaluation_beside_training_is_refused() -> None:
    import dataclasses

    base = dataclasses.replace(preset("shapes"), evaluation=EvaluationConfig(asynchronous=True))
    with pytest.raises(ConfigError, match="asynchronous is not for sweeps"):
        check_space(Space(name="mine", values={"kl_coef": tune.uniform(1, 2)}), base)


@pytest.mark.parametrize("numbers", [(0, "auto"), (4, 0), (4, "all")])
def test_a_request_for_no_trials(numbers: tuple) -> None:
    with pytest.raises(ConfigError, match="expected"):
        check_request(*numbers)
