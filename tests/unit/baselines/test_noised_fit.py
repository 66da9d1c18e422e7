"""The fit of a classifier of noised latents, beside the exact answer; its folder and its command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl_ray.baselines import noised_fit
from ctrl_ray.baselines.labelled import LabelledLatents
from ctrl_ray.baselines.noised_classifier import SETTINGS, NoisedClassifier
from ctrl_ray.baselines.noised_fit import fit_noised
from ctrl_ray.classifiers.examples import split_of
from ctrl_ray.classify import main
from ctrl_ray.config import ClassifierConfig, ControlConfig, TrainConfig
from ctrl_ray.embedded import CLASSIFIER
from ctrl_ray.errors import DataError, ModelError, NonFiniteError
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.schedule import ddim_scheduler

SPEC = ControlConfig(classes=("dark", "bright"))
CONFIG = TrainConfig(controls={"light": SPEC}, classifier=ClassifierConfig(epochs=4, batch_size=64, learning_rate=4e-3))
SHIFT, SHAPE = 0.25, (4, 4, 4)


def _data(num: int = 600) -> LabelledLatents:
    """x_0 ~ N(±0.25, 1) in each of 64 places, the sign by the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (num, 1), generator=generator)
    latents = torch.randn(num, *SHAPE, generator=generator) + SHIFT * (2 * labels[:, :, None, None] - 1)
    split = torch.from_numpy(split_of(num, (0.8, 0.1, 0.1), 0))
    return LabelledLatents(latents=latents, prompts=("",) * num, labels=labels, split=split, controls={"light": SPEC})


def _bright(latents: Tensor, alpha: float) -> Tensor:
    """The exact p(bright|x_t): x_t ~ N(±√ᾱ 0.25, 1) in each place, so its log-odds are 2 √ᾱ 0.25 Σ x_t."""
    return torch.sigmoid(2 * alpha**0.5 * SHIFT * latents.flatten(1).sum(1))


@pytest.fixture(scope="module")
def fitted() -> tuple[NoisedClassifier, list[str]]:
    lines: list[str] = []
    return fit_noised(CONFIG, "light", _data(), say=lines.append), lines


def test_it_comes_near_the_exact_probabilities_at_every_noise_level(fitted: tuple[NoisedClassifier, list[str]]) -> None:
    classifier, lines = fitted
    alphas = ddim_scheduler(load_backbone("shapes").scheduler_config()).alphas_cumprod
    data = _data(1000).latents
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(5))
    for timestep in (10, 300, 600, 990):
        alpha = float(alphas[timestep])
        noised = alpha**0.5 * data + (1 - alpha) ** 0.5 * noise
        found = classifier(noised, torch.tensor(timestep)).exp()[:, 1]
        exact = _bright(noised, alpha)
        assert float((found - exact).abs().mean()) < 0.1, timestep
        # a constant answer is much further off where there is something to see
        assert timestep == 990 or float((0.5 - exact).abs().mean()) > 0.1
    assert len(lines) == 4 and lines[-1].startswith("noised classifier of light: epoch 4/4, loss ")


def test_the_figures_are_those_of_held_out_images_by_noise_level(fitted: tuple[NoisedClassifier, list[str]]) -> None:
    figures = fitted[0].held_out
    assert figures["num_images"] == int((_data().split == 2).sum())
    ranges = figures["by_timesteps"]
    assert [(row["from"], row["below"]) for row in ranges] == [(100 * i, 100 * i + 100) for i in range(10)]
    accuracies = [row["accuracy"] for row in ranges]
    assert accuracies[0] > 0.85 and accuracies[0] > accuracies[-1] + 0.15
    assert figures["all"]["accuracy"] == pytest.approx(sum(accuracies) / 10)  # as many images in each


def test_the_same_seed_gives_the_same_weights_and_another_does_not(fitted: tuple[NoisedClassifier, list[str]]) -> None:
    short = dataclasses.replace(CONFIG, classifier=dataclasses.replace(CONFIG.classifier, epochs=1, max_images=None))
    torch.manual_seed(1)
    weights = [
        torch.cat([p.flatten() for p in fit_noised(config, "light", _data(80)).parameters()])
        for config in (short, short, dataclasses.replace(short, seed=1))
    ]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_loss_that_is_not_finite_stops_the_fit() -> None:
    data = _data(100)
    data.latents[:] = torch.nan
    with pytest.raises(NonFiniteError, match=r"loss is nan .* lower classifier.learning_rate \(0.004\)"):
        fit_noised(CONFIG, "light", data)
    with pytest.raises(DataError, match="2 images make splits of"):
        fit_noised(CONFIG, "light", _data(2))


def test_a_folder_is_the_classifier(fitted: tuple[NoisedClassifier, list[str]], tmp_path: Path) -> None:
    classifier = fitted[0]
    classifier.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", SETTINGS]
    again = NoisedClassifier.from_pretrained(tmp_path, "light")
    latents = torch.randn(3, *SHAPE)
    assert torch.equal(again(latents, torch.tensor(500)), classifier(latents, torch.tensor([500, 500, 500])))
    torch.testing.assert_close(again(latents, torch.tensor(500)).exp().sum(1), torch.ones(3))
    assert (again.spec, again.base_model, again.held_out) == (SPEC, "shapes", classifier.held_out)
    with pytest.raises(ModelError, match=r"fitted for control 'light', but it is given for 'stars'.*--noised"):
        NoisedClassifier.from_pretrained(tmp_path, "stars")
    settings = json.loads((tmp_path / SETTINGS).read_text())
    for change, message in (
        ({"classes": ["a", "b", "c"]}, "has 3 outputs"),
        ({"network_arguments": {"channels": 4, "widths": [65]}}, "cannot be built from its arguments"),
        ({"latent_shape": "four"}, "latent_shape is 'four'"),
    ):
        (tmp_path / SETTINGS).write_text(json.dumps({**settings, **change}))
        with pytest.raises(ModelError, match=message):
            NoisedClassifier.from_pretrained(tmp_path)


def test_other_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"holds a classifier of clean images; expected one of noised latents.*--noised"
    ):
        NoisedClassifier.from_pretrained(CLASSIFIER)
    with pytest.raises(ModelError, match=r"holds no noised_classifier.json; expected a folder that .*--noised"):
        NoisedClassifier.from_pretrained(tmp_path)


def test_it_knows_the_prompt_where_it_is_asked_to() -> None:
    torch.manual_seed(0)
    one = NoisedClassifier.new(
        "light", SPEC, latent_shape=SHAPE, base_model="shapes", prompt_conditional=True
    ).requires_grad_(False)
    torch.nn.init.normal_(one.network.blocks[0].second.weight)  # type: ignore[union-attr, arg-type]
    latents, timestep = torch.randn(1, *SHAPE).repeat(2, 1, 1, 1), torch.tensor(3)
    first, second = one(latents, timestep, ["a red circle", "a blue cross"])
    assert not torch.equal(first, second)
    with pytest.raises(ModelError, match="depends on the prompt: expected 2 prompts, one for each image, got none"):
        one(latents, timestep)


def test_large_latents_are_halved_to_8() -> None:
    found = {
        side: NoisedClassifier.new("light", SPEC, latent_shape=(4, side, side), base_model="x").arguments["widths"]
        for side in (8, 16, 64)
    }
    assert found == {8: [64, 128], 16: [64, 128], 64: [64, 128, 128, 128]}


def test_the_command_fits_on_the_labelled_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def read(config: TrainConfig, controls: list[str], **options: Any) -> LabelledLatents:
        asked.append((config.data, controls, config.classifier.max_images))
        return dataclasses.replace(_data(60), controls={"jpeg_size": config.controls["jpeg_size"]})

    monkeypatch.setattr(noised_fit, "read_labelled", read)
    flags = ["--noised", "--output-dir", str(tmp_path), "--classifier.epochs", "1", "--classifier.max-images", "60"]
    assert main(flags) == 0
    assert asked == [("shapes", ["jpeg_size"], 60)]
    out = capsys.readouterr().out
    assert "the 2000 samples of the pipeline (classifier.num_pipeline_samples) are not used" in out
    assert "noised classifier of jpeg_size: epoch 1/1" in out and "\n900-999 " in out
    assert NoisedClassifier.from_pretrained(tmp_path, "jpeg_size").spec.num_classes == 4
    assert main(flags) == 2
    assert (
        "already holds a noised classifier; choose another output folder, or give --overwrite"
        in capsys.readouterr().err
    )
    assert main([*flags, "--overwrite", "--classifier.network", "clip:x"]) == 2
    assert "has a network of its own" in capsys.readouterr().err
