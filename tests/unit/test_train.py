"""Everything that a user can get wrong and that is said before Ray starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from ctrl_ray.config import ControlConfig, EvaluationConfig, RewardPoolConfig, SamplerConfig, ScalingConfig, TrainConfig
from ctrl_ray.config.json import to_json
from ctrl_ray.driver.pre_trained import has_target
from ctrl_ray.errors import ConfigError, CtrlRayError, ModelError, ResourceError
from ctrl_ray.planning.preflight import _check_evaluation, preflight
from ctrl_ray.train import main, parse


@pytest.fixture
def config(tiny_pipeline: Path, tmp_path: Path) -> TrainConfig:
    """A run on the tiny pipeline whose classifier would be fitted."""
    return TrainConfig(
        output_dir=str(tmp_path / "run"),
        base_model=str(tiny_pipeline),
        data="shapes",
        controls={"jpeg_size": ControlConfig(oracle="jpeg_size", thresholds=(900.0, 1000.0))},
        global_batch_size=8,
        micro_batch_size_per_worker=4,
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"controls": {}}, ConfigError, "no control"),
        ({"data": None}, ConfigError, "no classifier and there is no data"),
        ({"data": "missing.parquet"}, CtrlRayError, "missing.parquet"),
        ({"prompts_file": "missing.txt"}, ConfigError, r"missing\.txt does not exist"),
        ({"base_model": "/nowhere/model"}, ModelError, "does not exist"),
        ({"init_adapter": "/nowhere/adapter"}, ModelError, r"adapter folder /nowhere/adapter does not exist"),
        ({"scaling": ScalingConfig(num_workers=2, cpus_per_worker=4000)}, ResourceError, r"needs 8001 CPUs.*has \d+"),
        (
            {"scaling": ScalingConfig(use_gpu=True, num_workers=64, cpus_per_worker=0.01), "global_batch_size": 256},
            ResourceError,
            r"needs 64 GPUs .*has \d+",
        ),
        (
            {"evaluation": EvaluationConfig(asynchronous=True), "scaling": ScalingConfig(use_gpu=True)},
            ConfigError,
            r"evaluation\.num_gpus is 0: the evaluations would run on the CPU.*set evaluation\.num_gpus \(0\.2",
        ),
        ({"controls": {"x": ControlConfig(oracle="jpeg_sise", thresholds=(1.0,))}}, CtrlRayError, "jpeg_size"),
        ({"controls": {"x": ControlConfig(classifier="/nowhere")}}, ModelError, "nowhere"),
        ({"controls": {"x": ControlConfig(oracle="jpeg_size")}}, ConfigError, "0 classes"),
    ],
)
def test_mistakes_are_named_before_ray_starts(
    config: TrainConfig, changes: dict, error: type[Exception], message: str
) -> None:
    """One clear message each."""
    with pytest.raises(error, match=message):
        preflight(dataclasses.replace(config, **changes))


def test_an_evaluation_beside_a_run_on_the_cpu_is_on_the_cpu_too() -> None:
    _check_evaluation(TrainConfig(evaluation=EvaluationConfig(asynchronous=True)))
    gpu, both = ScalingConfig(use_gpu=True), EvaluationConfig(asynchronous=True, num_gpus=0.2)
    _check_evaluation(TrainConfig(scaling=gpu, evaluation=both))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sampler.eta", "0"], "eta is 0.0: a deterministic step has no density"),
        (["--global-batch-size", "4", "--scaling.num-workers", "8"],
         "global_batch_size (4) has 4 groups of group_size (1), which is not one for each of the 8 workers"),
        (["--preset", "nope"], "preset 'nope' is unknown; expected one of shapes"),
        (["--config", "nope.json"], "nope.json does not exist"),
        (["--control", "jpeg_size"], "is not NAME=CLASSIFIER_FOLDER"),
        (["--control", "x=/nowhere"], "/nowhere"),
        (["--controls.jpeg-size.guidance-strength", "-1"], "guidance_strength is -1.0"),
    ],
)  # fmt: skip
def test_command_line_mistakes_exit_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The message on standard error, no traceback."""
    try:
        status = main([*argv, "--dry-run", "--output-dir", str(tmp_path / "run")])
    except SystemExit as stop:  # how the parser ends the process after a value it could not take
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_flags_override_the_preset_and_a_config_file(tmp_path: Path) -> None:
    """--config FILE is a run's config.json; flags go over it; --control takes the place of the preset's controls."""
    arguments = parse(["--kl-coef", "0.5", "--sampler.num-steps", "7", "--resume"])
    assert (arguments.config.kl_coef, arguments.config.sampler.num_steps, arguments.resume) == (0.5, 7, True)
    file = tmp_path / "config.json"
    file.write_text(to_json(dataclasses.replace(arguments.config, num_updates=3)))
    again = parse(["--config", str(file), "--seed", "9"])
    assert again.config == dataclasses.replace(arguments.config, num_updates=3, seed=9)
    chosen = parse(["--control", "a=/x", "--control=b=/y"]).config.controls
    assert {name: control.classifier for name, control in chosen.items()} == {"a": "/x", "b": "/y"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--scaling.gradient-checkpointing"], (True, "auto")),
        (["--scaling.gradient_checkpointing", "--estimator.keep-graphs", "false"], (True, False)),
        (["--scaling.gradient-checkpointing", "auto", "--estimator.no-keep-graphs"], ("auto", False)),
        (["--scaling.no-gradient-checkpointing", "--resume"], (False, "auto")),
        (["--scaling.gradient_checkpointing", "True", "--estimator.keep_graphs", "False"], (True, False)),
    ],
)
def test_a_switch_that_may_be_auto_is_a_switch_all_the_same(flags: list[str], expected: tuple[object, object]) -> None:
    """Alone, with no-, or with a value."""
    config = parse(flags).config
    assert (config.scaling.gradient_checkpointing, config.estimator.keep_graphs) == expected


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RewardPoolConfig(num_actors=-1), r"rewards\.num_actors is -1; expected at least 0"),
        (lambda: EvaluationConfig(num_samples=0), r"num_samples is 0; expected at least 1"),
        (lambda: SamplerConfig(num_steps=0), r"num_steps is 0; expected at least 1"),
    ],
)
def test_pool_and_evaluation_settings_are_checked(build: Callable[[], object], message: str) -> None:
    """Values that could never work."""
    with pytest.raises(ConfigError, match=message):
        build()


def test_draft_k_is_a_few_flags() -> None:
    """DRaFT-K of the baselines: the last K steps, no KL; the preset's bound on drifts has to go, and that is said."""
    flags = ["--estimator.name", "last_k", "--estimator.steps", "3", "--kl-coef", "0"]
    with pytest.raises(ConfigError, match="without a KL no drift is too long; set max_drift and final_max_drift to 0"):
        parse(flags)
    config = parse([*flags, "--estimator.max-drift", "0", "--estimator.final-max-drift", "0"]).config
    assert (config.estimator.name, config.estimator.steps, config.kl_coef) == ("last_k", 3, 0.0)
    assert not has_target(config), "no certificate, for there is no law that it tends to"
