"""The paper's two experiments: the settings that its public code has, and prompts of our own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ctrl_ray.config import ControlConfig, TrainConfig
from ctrl_ray.config.paths import absolute_oracle, absolute_paths
from ctrl_ray.config.presets import ANIMALS, ANIMALS_HELD_BACK, preset
from ctrl_ray.errors import ConfigError
from ctrl_ray.offline.prompts import read_prompts, training_prompts

PAPER = ("paper-compressibility", "paper-multi-task")


@pytest.mark.parametrize("name", PAPER)
def test_the_sampler_is_the_papers(name: str) -> None:
    config = preset(name)
    sampler = config.sampler
    assert (sampler.num_steps, sampler.eta, sampler.guidance_scale, sampler.control_scale) == (50, 1.0, 7.5, None)
    assert sampler.null_branch == "pre_trained" and config.adapter.kind == "embedding"
    assert config.base_model == "stable-diffusion-v1-5/stable-diffusion-v1-5"


@pytest.mark.parametrize(
    ("name", "lora_rate", "batch", "borders", "exponents"),
    [
        ("paper-compressibility", 1e-3, 256, {"jpeg_size": (60e3, 85e3, 110e3)}, {"jpeg_size": 10.0}),
        (
            "paper-multi-task",
            3e-4,
            512,
            {"jpeg_size": (70e3,), "aesthetic": (5.7,)},
            {"jpeg_size": 20.0, "aesthetic": 10.0},
        ),
    ],
)
def test_rates_batch_and_exponents(
    name: str,
    lora_rate: float,
    batch: int,
    borders: dict[str, tuple[float, ...]],
    exponents: dict[str, float],
) -> None:
    """The exponent is the ratio that the public code states, reward 0.1 over KL 0.01, with a KL that is summed."""
    config, optimizer = preset(name), preset(name).optimizer
    assert (optimizer.learning_rate, optimizer.embedding_learning_rate) == (lora_rate, 1e-2)
    assert (optimizer.beta1, optimizer.beta2, optimizer.weight_decay, optimizer.gradient_clipping) == (
        0.9,
        0.999,
        0.1,
        5.0,
    )
    assert config.global_batch_size == batch and config.latent_reduction == "sum" and config.kl_coef == 0.01
    assert {key: control.thresholds for key, control in config.controls.items()} == borders
    found = {key: control.guidance_strength / config.kl_coef for key, control in config.controls.items()}
    assert found == pytest.approx(exponents)


def test_a_size_at_a_border_is_of_the_larger_class() -> None:
    """Classes by bytes of 1000 to the kB, from below."""
    classify = preset("paper-compressibility").controls["jpeg_size"].classify
    assert [classify(kb * 1000) for kb in (59.999, 60, 84.999, 85, 109.999, 110)] == [0, 1, 1, 2, 2, 3]


@pytest.mark.parametrize("name", PAPER)
def test_the_animals_that_are_held_back_are_no_training_prompts(name: str) -> None:
    config = preset(name)
    trained = training_prompts(config)
    held_back = read_prompts(config.evaluation.prompts_file or "")
    assert len(trained) == len(set(trained)) == 45 and len(held_back) == len(set(held_back)) == 15
    words = {word for prompt in trained for word in prompt.split()}
    assert not words & {word for prompt in held_back for word in prompt.split()}
    assert all(prompt == prompt.lower().strip() for prompt in (*trained, *held_back))


def test_the_prompts_are_beside_the_package() -> None:
    """Where package-data of pyproject.toml takes them into a wheel from."""
    package = Path(__file__).parents[3] / "ctrl_ray"
    assert {ANIMALS, ANIMALS_HELD_BACK} == set((package / "prompts").glob("*.txt"))


def test_files_of_oracles_and_networks_are_absolute_where_workers_read_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip").mkdir()
    base = TrainConfig(
        controls={
            "one": ControlConfig(classes=("a", "b"), oracle="clip_head:head.safetensors@clip", network="clip:clip"),
            "two": ControlConfig(classes=("a", "b"), oracle="module:function", network="transformers:google/vit"),
        },
        evaluation=dataclasses.replace(TrainConfig().evaluation, clip_model="clip", brisque_model="b"),
    )
    config = absolute_paths(base)
    one, two = config.controls.values()
    clip = tmp_path / "clip"
    assert one.oracle == f"clip_head:{tmp_path / 'head.safetensors'}@{clip}" and one.network == f"clip:{clip}"
    assert (two.oracle, two.network) == ("module:function", "transformers:google/vit")
    assert (config.evaluation.clip_model, config.evaluation.brisque_model) == (str(clip), str(tmp_path / "b"))
    assert absolute_paths(config) == config
    assert (
        absolute_oracle("clip_head:a.safetensors@openai/clip") == f"clip_head:{tmp_path / 'a.safetensors'}@openai/clip"
    )


@pytest.mark.parametrize("network", ["vgg", "clip", "clip:"])
def test_a_network_of_a_control_is_one_of_the_known(network: str) -> None:
    with pytest.raises(
        ConfigError, match=r"network of a control '.*' is unknown; expected 'cnn', 'clip:NAME_OR_FOLDER'"
    ):
        ControlConfig(network=network)
