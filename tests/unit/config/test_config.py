"""Checks of the configuration: each refuses with a message that names the setting and both values."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ctrl_ray.config import (
    AdapterConfig,
    ClassifierConfig,
    ControlConfig,
    EstimatorConfig,
    EvaluationConfig,
    LoraConfig,
    OptimizerConfig,
    RewardPoolConfig,
    SamplerConfig,
    ScalingConfig,
    TrainConfig,
)
from ctrl_ray.config.json import to_json, train_config_from_json
from ctrl_ray.config.presets import preset
from ctrl_ray.errors import ConfigError
from ctrl_ray.offline.prompts import read_prompts

CLASSES = [
    TrainConfig,
    ControlConfig,
    ClassifierConfig,
    SamplerConfig,
    LoraConfig,
    OptimizerConfig,
    RewardPoolConfig,
    ScalingConfig,
    EstimatorConfig,
    EvaluationConfig,
]


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (ControlConfig, {"guidance_strength": -0.5}, "guidance_strength is -0.5; expected at least 0"),
        (ControlConfig, {"guidance_strength": math.inf}, "guidance_strength is inf; expected a finite number"),
        (ControlConfig, {"guidance_strength": math.nan}, "guidance_strength is nan; expected a finite number"),
        (ControlConfig, {"thresholds": (3.0, 2.0)}, "thresholds (3.0, 2.0) must be strictly ascending"),
        (ControlConfig, {"thresholds": (2.0, 2.0)}, "thresholds (2.0, 2.0) must be strictly ascending"),
        (
            ControlConfig,
            {"thresholds": (1.0, 2.0), "classes": ("a", "b")},
            "2 thresholds make 3 classes, but classes names 2: ('a', 'b')",
        ),
        (
            ControlConfig,
            {"classes": ("a", "b"), "label_weights": (1.0, 1.0, 1.0)},
            "label_weights (1.0, 1.0, 1.0) must hold one weight >= 0 for each of the 2 classes",
        ),
        (
            ControlConfig,
            {"classes": ("a", "b"), "label_weights": (2.0, -1.0)},
            "label_weights is (2.0, -1.0); expected each at least 0",
        ),
        (ControlConfig, {"classes": ("a", "b"), "label_weights": (0.0, 0.0)}, "label_weights (0.0, 0.0) must hold"),
        (ClassifierConfig, {"split": (0.5, 0.5, 0.5)}, "split (0.5, 0.5, 0.5) must be three positive shares"),
        (
            ClassifierConfig,
            {"split": (1.0, 0.0, 0.0)},
            "classifier.split is (1.0, 0.0, 0.0); expected each a number above 0",
        ),
        (ClassifierConfig, {"epochs": 0}, "epochs is 0; expected at least 1"),
        (ClassifierConfig, {"batch_size": 0}, "batch_size is 0; expected at least 1"),
        (ClassifierConfig, {"num_workers": 0}, "num_workers is 0; expected at least 1"),
        (ClassifierConfig, {"network": "vgg"}, "network 'vgg' is unknown; expected 'cnn', 'clip:NAME_OR_FOLDER'"),
        (ClassifierConfig, {"network": "clip"}, "network 'clip' is unknown"),
        (SamplerConfig, {"num_steps": 0}, "num_steps is 0; expected at least 1"),
        (SamplerConfig, {"eta": 1.5}, "eta is 1.5; expected a number in [0, 1]"),
        (SamplerConfig, {"eta": -0.1}, "eta is -0.1; expected at least 0"),
        (LoraConfig, {"rank": 0}, "rank is 0; expected at least 1"),
        (RewardPoolConfig, {"num_actors": -1}, "rewards.num_actors is -1; expected at least 0"),
        (RewardPoolConfig, {"timeout_s": 0.0}, "rewards.timeout_s is 0.0; expected a number above 0"),
        (RewardPoolConfig, {"decode_chunk_size": 0}, "rewards.decode_chunk_size is 0; expected at least 1, or auto"),
        (ScalingConfig, {"num_workers": 0}, "scaling.num_workers is 0; expected at least 1"),
        (ScalingConfig, {"cpus_per_worker": 0.0}, "scaling.cpus_per_worker is 0.0; expected a number above 0"),
        (EvaluationConfig, {"every_updates": -1}, "evaluation.every_updates is -1; expected at least 0"),
        (EvaluationConfig, {"num_samples": 0}, "evaluation.num_samples is 0; expected at least 1"),
        (EvaluationConfig, {"final_num_samples": 0}, "evaluation.final_num_samples is 0; expected at least 1"),
        (EvaluationConfig, {"batch_size": 0}, "evaluation.batch_size is 0; expected at least 1"),
        (TrainConfig, {"num_updates": 0}, "num_updates is 0; expected at least 1"),
        (TrainConfig, {"global_batch_size": 0}, "global_batch_size is 0; expected at least 1"),
        (TrainConfig, {"micro_batch_size_per_worker": 0}, "micro_batch_size_per_worker is 0; expected at least 1"),
        (TrainConfig, {"kl_coef": -1.0}, "kl_coef is -1.0; expected at least 0"),
        (TrainConfig, {"kl_coef": math.nan}, "kl_coef is nan; expected a finite number, at least 0"),
        (TrainConfig, {"control_dropout": 1.0}, "control_dropout is 1.0; expected a number in [0, 1), or auto"),
        (TrainConfig, {"checkpoint_every_updates": 0}, "checkpoint_every_updates is 0; expected at least 1"),
        (
            TrainConfig,
            {"training_method": "cfg"},
            "training_method cfg is trained on labelled images, but there is no data",
        ),
        (
            TrainConfig,
            {"training_method": "cfg", "data": "shapes", "group_size": 2},
            "training_method cfg draws no trajectories: it has no estimator, no graphs to keep and no groups; got "
            "estimator.name full, estimator.keep_graphs False and group_size 2",
        ),
        (
            TrainConfig,
            {"training_method": "cfg", "data": "shapes", "estimator": EstimatorConfig(name="last_k")},
            "got estimator.name last_k",
        ),
        (
            TrainConfig,
            {"training_method": "cfg", "data": "shapes", "estimator": EstimatorConfig(keep_graphs=True)},
            "got estimator.name full, estimator.keep_graphs True",
        ),
        (TrainConfig, {"training_method": "ddpo"}, "training_method is 'ddpo' (str); expected 'ctrl' or 'cfg'"),
        (TrainConfig, {"sampler": SamplerConfig(eta=0.0)}, "eta is 0.0: a deterministic step has no density"),
    ],
)
def test_a_value_that_cannot_run_is_refused_by_name_and_value(
    cls: type, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        cls(**settings)


def test_a_batch_that_cannot_be_shared_names_all_numbers_and_a_way_out() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(
            global_batch_size=12, micro_batch_size_per_worker=4, group_size=2, scaling=ScalingConfig(num_workers=8)
        )
    text = str(caught.value)
    assert "global_batch_size (12) has 6 groups of group_size (2)" in text and "each of the 8 workers" in text
    assert "at least 16" in text
    scaling = ScalingConfig(num_workers=8)
    assert TrainConfig(global_batch_size=16, micro_batch_size_per_worker=4, group_size=2, scaling=scaling)
    with pytest.raises(ConfigError, match=r"global_batch_size \(18\) must be divisible by group_size \(4\).*try 20"):
        TrainConfig(global_batch_size=18, micro_batch_size_per_worker=4, group_size=4)


@pytest.mark.parametrize(
    ("global_batch_size", "group_size", "micro", "workers", "shares", "expected"),
    [
        (64, 1, 32, 1, (64, 64), 2),
        (64, 1, 32, 2, (32, 32), 1),
        (48, 1, 4, 3, (16, 16), 4),
        (256, 1, 5, 28, (9, 10), 2),
        (96, 1, 5, 8, (12, 12), 3),
        (24, 4, 4, 4, (4, 8), 2),  # six groups of four
    ],
)
def test_num_micro_batches_is_what_a_worker_runs_for_one_update(
    global_batch_size: int, group_size: int, micro: int, workers: int, shares: tuple[int, int], expected: int
) -> None:
    settings = TrainConfig(
        global_batch_size=global_batch_size,
        group_size=group_size,
        micro_batch_size_per_worker=micro,
        scaling=ScalingConfig(num_workers=workers),
    )
    assert settings.worker_shares == shares
    assert settings.num_micro_batches == expected


def test_a_worker_reserves_its_cpus_and_a_gpu_where_it_has_one() -> None:
    assert ScalingConfig(cpus_per_worker=2).worker_resources == {"CPU": 2.0}
    assert ScalingConfig(cpus_per_worker=0.5, use_gpu=True).worker_resources == {"CPU": 0.5, "GPU": 1.0}
    assert ScalingConfig(use_gpu=True, gpus_per_worker=0.6, num_workers=4).worker_resources == {"CPU": 1.0, "GPU": 0.6}
    assert ScalingConfig(use_gpu=True, gpus_per_worker=0.3).worker_resources == {"CPU": 1.0, "GPU": 0.3}


@pytest.mark.parametrize(("share", "workers"), [(0.5, 2), (0.5, "auto"), (0.0, 1), (1.5, 1), (-1.0, 2)])
def test_a_card_holds_one_worker(share: float, workers: Any) -> None:
    """NCCL refuses two ranks on one card; a single worker may have as little as it likes."""
    message = rf"gpus_per_worker is {share} with scaling.num_workers {workers}; expected a share above 0.5.*NCCL"
    with pytest.raises(ConfigError, match=message):
        ScalingConfig(use_gpu=True, gpus_per_worker=share, num_workers=workers)


def test_what_is_left_open_is_no_number_yet() -> None:
    """Nothing computes with 'auto': the typed accessors say by name what has no value."""
    scaling = ScalingConfig(num_workers="auto", gpus_per_worker="auto", gradient_checkpointing="auto")
    rewards = RewardPoolConfig(gpus_per_actor="auto", decode_chunk_size="auto")
    settings = TrainConfig(
        micro_batch_size_per_worker="auto",
        scaling=scaling,
        rewards=rewards,
        evaluation=EvaluationConfig(batch_size="auto"),
    )
    assert train_config_from_json(to_json(settings)) == settings
    for name, ask in {
        "scaling.num_workers": lambda: scaling.fixed_num_workers,
        "scaling.gpus_per_worker": lambda: dataclasses.replace(scaling, use_gpu=True).worker_resources,
        "scaling.gradient_checkpointing": lambda: scaling.fixed_gradient_checkpointing,
        "rewards.gpus_per_actor": lambda: rewards.fixed_gpus_per_actor,
        "rewards.decode_chunk_size": lambda: rewards.fixed_decode_chunk_size,
        "evaluation.batch_size": lambda: settings.evaluation.fixed_batch_size,
        "micro_batch_size_per_worker": lambda: settings.fixed_micro_batch_size,
    }.items():
        with pytest.raises(ConfigError, match=rf"{name} is 'auto': it becomes a number when a run is prepared"):
            ask()


def test_class_names_come_from_the_thresholds_unless_they_are_given() -> None:
    assert ControlConfig(thresholds=(1500.0, 1700.5)).class_names == ("<1500", "1500-1700.5", ">=1700.5")
    assert ControlConfig(thresholds=(0.5,)).class_names == ("<0.5", ">=0.5")
    assert ControlConfig(thresholds=(1.0,), classes=("low", "high")).class_names == ("low", "high")
    assert ControlConfig(classes=("x", "y", "z")).num_classes == 3
    assert ControlConfig().num_classes == 0


def test_a_border_value_belongs_to_the_class_above_it() -> None:
    control = ControlConfig(thresholds=(10.0, 20.0, 30.0))
    values = [-5.0, 9.999, 10.0, 19.0, 20.0, 30.0, 1e9]
    assert [control.classify(value) for value in values] == [0, 0, 1, 1, 2, 3, 3]


@pytest.mark.parametrize("cls", CLASSES)
def test_configs_are_frozen_and_survive_pickling(cls: type) -> None:
    settings = cls()
    name = dataclasses.fields(cls)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(settings, name, getattr(settings, name))
    assert pickle.loads(pickle.dumps(settings)) == settings


def _unusual() -> TrainConfig:
    return TrainConfig(
        output_dir="somewhere/else",
        controls={
            "jpeg_size": ControlConfig(
                guidance_strength=2.5, oracle="jpeg_size", thresholds=(10.0, 20.0), label_weights=(1.0, 0.0, 2.0)
            ),
            "mood": ControlConfig(classes=("calm", "wild"), column="mood_label", classifier="runs/mood/classifier"),
        },
        num_updates=7,
        global_batch_size=24,
        micro_batch_size_per_worker=4,
        kl_coef=0.25,
        latent_reduction="mean",
        target_kl=4.5,
        sampler=SamplerConfig(num_steps=5, eta=0.5, guidance_scale=1.5, control_scale=2.0),
        estimator=EstimatorConfig(name="random_suffix", full_probability=0.5),
        adapter=AdapterConfig(kind="both"),
        group_size=2,
        lora=LoraConfig(rank=2, target_modules=("to_q", "to_v")),
        optimizer=OptimizerConfig(learning_rate=3e-4, gradient_clipping=0.0),
        rewards=RewardPoolConfig(num_actors=0),
        scaling=ScalingConfig(num_workers=3, zero_stage=3, precision="bf16"),
        classifier=ClassifierConfig(split=(0.6, 0.2, 0.2), max_images=100),
        evaluation=EvaluationConfig(every_updates=0, prompts_file="prompts.txt"),
    )


@pytest.mark.parametrize("settings", [TrainConfig(), _unusual()], ids=["defaults", "unusual"])
def test_json_round_trip_keeps_every_value_and_type(settings: TrainConfig) -> None:
    text = to_json(settings)
    assert train_config_from_json(text) == settings
    assert to_json(train_config_from_json(text)) == text


def test_the_round_trip_example_differs_from_the_defaults_in_every_nested_config() -> None:
    """Else the test above would not see a nested config that is dropped."""
    default, unusual = TrainConfig(), _unusual()
    nested = {f.name for f in dataclasses.fields(TrainConfig) if dataclasses.is_dataclass(getattr(default, f.name))}
    for name in (*nested, "controls"):
        assert getattr(default, name) != getattr(unusual, name), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_update": 3}, "run/config.json: unknown settings ['num_update'] for TrainConfig; known ones are ["),
        ({"sampler": {"steps": 3}}, "run/config.json: sampler: unknown settings ['steps'] for SamplerConfig"),
        (
            {"controls": {"jpeg_size": {"gamma": 1}}},
            "run/config.json: controls.jpeg_size: unknown settings ['gamma'] for ControlConfig",
        ),
    ],
)
def test_an_unknown_key_is_named_with_its_place_and_the_known_ones(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        train_config_from_json(json.dumps(change), source="run/config.json")


def test_values_from_json_pass_the_same_checks() -> None:
    with pytest.raises(ConfigError, match=r"config\.json: kl_coef is -2\.0; expected at least 0"):
        train_config_from_json('{"kl_coef": -2}')


def test_what_is_not_json_is_said_so() -> None:
    with pytest.raises(ConfigError, match=r"run/config\.json is not JSON"):
        train_config_from_json("{", source="run/config.json")


@pytest.mark.parametrize("cls", CLASSES)
def test_every_field_says_its_consequence(cls: type) -> None:
    """An attribute docstring stands behind each field; it is also the command line's help."""
    lines = inspect.getsource(sys.modules[cls.__module__]).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"class {cls.__name__}:"))
    for field in dataclasses.fields(cls):
        at = next(i for i in range(start, len(lines)) if re.match(rf"    {field.name}: ", lines[i]))
        assert lines[at + 1].startswith('    """'), f"{cls.__name__}.{field.name} has no docstring"


def test_read_prompts_skips_empty_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n\n  a blue cross  \n", encoding="utf-8")
    assert read_prompts(file) == ("a red circle", "a blue cross")


def test_read_prompts_refuses_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.txt does not exist; expected a text file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ConfigError, match=r"empty\.txt holds no prompt"):
        read_prompts(tmp_path / "empty.txt")


def test_cfg_finetuning_is_compared_on_equal_terms() -> None:
    """Its preset has the base model, images, control, sampler and places of LoRA that CTRL's has; labels are dropped."""
    ours, other = preset("shapes"), preset("shapes-cfg")
    assert not other.draws_trajectories and other.fixed_control_dropout == 0.1
    assert (other.adapter.kind, other.lora) == ("embedding", ours.lora)
    for name in ("base_model", "data", "num_drawn_images", "controls", "sampler", "kl_coef", "classifier", "seed"):
        assert getattr(other, name) == getattr(ours, name), name


def test_importing_the_configuration_loads_neither_torch_nor_ray() -> None:
    """So that --help and every configuration error come at once."""
    heavy = "{'aim', 'deepspeed', 'diffusers', 'ray', 'torch', 'transformers'}"
    code = f"import sys, ctrl_ray.config, ctrl_ray.config.presets, ctrl_ray.errors; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_gains_of_one_control_are_trained_with_a_label_always() -> None:
    size, colour = ControlConfig(classes=("small", "large")), ControlConfig(classes=("grey", "bright"))
    shares = {
        (kind, len(controls)): TrainConfig(adapter=AdapterConfig(kind=kind), controls=controls).fixed_control_dropout
        for kind in ("gains", "embedding", "both")
        for controls in ({"size": size}, {"size": size, "colour": colour})
    }
    assert shares.pop(("gains", 1)) == 0
    assert set(shares.values()) == {0.1}
    one = TrainConfig(adapter=AdapterConfig(kind="gains"), controls={"size": size}, control_dropout=0.3)
    assert one.fixed_control_dropout == 0.3
