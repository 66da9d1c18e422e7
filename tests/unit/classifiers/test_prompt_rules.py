"""Labels that depend on a word of the prompt which the image does not show: with and without the prompt in the classifier."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ctrl_ray.classifiers.classifier import new_network
from ctrl_ray.classifiers.examples import BlockWriter, Example, Examples
from ctrl_ray.classifiers.worker import FitJob, _Fitter
from ctrl_ray.config import ClassifierConfig, ControlConfig, TrainConfig
from ctrl_ray.oracles import jpeg_size, measure
from tests.prompt_rules import SHIFTS, draw_with_rules

THRESHOLD = 3000.0
SPEC = ControlConfig(
    oracle="tests.prompt_rules:jpeg_size_by_prompt", thresholds=(THRESHOLD,), classes=("small", "large")
)


def _examples(folder: Path, config: TrainConfig, num_images: int) -> Examples:
    """As stage 1 labels and stores them."""
    drawn = [Example(np.asarray(image), prompt, None) for image, prompt in draw_with_rules(num_images, seed=0)]
    writer = BlockWriter(config, "size", folder, torch.device("cpu"))
    return Examples(folder, writer.write_data(drawn, 0, 1), 0, config.classifier.split, config.seed)


def _config(prompt_conditional: bool) -> TrainConfig:
    settings = ClassifierConfig(
        decode=False, prompt_conditional=prompt_conditional, epochs=8, batch_size=64, learning_rate=5e-3
    )
    return TrainConfig(data="shapes", controls={"size": SPEC}, classifier=settings)


def _fitted(folder: Path, *, prompt_conditional: bool) -> torch.nn.Module:
    config = _config(prompt_conditional)
    examples = _examples(folder, config, 2000)
    torch.manual_seed(0)
    network, _ = new_network("cnn", 2, prompt_conditional=prompt_conditional)
    job = FitJob(config=config, control="size", image_size=(64, 64), folder=None)
    best = _Fitter(job, examples, network, 0, 1, torch.device("cpu")).fit()
    network.load_state_dict(best.weights)
    return network.eval()


def test_stage_1_labels_an_image_by_the_rule_of_its_prompt(tmp_path: Path) -> None:
    """The same sizes get other labels under other words, and either word is as likely whatever the size."""
    examples = _examples(tmp_path, _config(True), 600)
    images, prompts, labels = examples.batch(np.arange(600))
    sizes = measure(jpeg_size, (images.permute(0, 2, 3, 1) * 255).round().byte().numpy())
    shifts = np.array([400.0 if prompt.endswith("strict") else -400.0 for prompt in prompts])
    assert labels.tolist() == (sizes >= THRESHOLD + shifts).astype(int).tolist()
    between = (sizes >= 2600) & (sizes < 3400)
    assert between.sum() > 100 and set(labels[between].tolist()) == {0, 1}
    for rows in (sizes < 2600, between, sizes >= 3400):  # p(strict|x) = 1/2: within 4 standard errors
        assert (shifts[rows] > 0).mean() == pytest.approx(0.5, abs=2 / rows.sum() ** 0.5)


def test_the_pipelines_samples_are_labelled_by_the_rules_of_their_prompts_too(tmp_path: Path) -> None:
    """The same 4 images under either word: two of them lie between the thresholds and change their class."""
    drawn = sorted(
        (np.asarray(image) for image, _ in draw_with_rules(40, seed=0)), key=lambda a: measure(jpeg_size, a[None])[0]
    )
    sizes = measure(jpeg_size, np.stack(drawn))
    below, above = np.searchsorted(sizes, [2600, 3400])
    images = np.stack([drawn[0], drawn[below], drawn[above - 1], drawn[-1]])
    assert above - below >= 2 and below > 0 and above < len(drawn)

    def sample_pipeline(num: int, seed: int) -> Iterator[tuple[np.ndarray, list[str]]]:
        for word in ("strict", "mild"):
            yield images, [f"a red circle {word}"] * 4

    writer = BlockWriter(_config(False), "size", tmp_path, torch.device("cpu"))
    writer.write_samples(sample_pipeline, 8, 0, 1)
    examples = Examples(tmp_path, 0, 8, (0.5, 0.25, 0.25), seed=0)
    assert examples.labels.tolist() == [0, 0, 0, 1, 0, 1, 1, 1]


@pytest.mark.full
def test_only_the_prompt_conditional_classifier_learns_the_rule_and_the_other_the_average(tmp_path: Path) -> None:
    """p(large|x,c) is 0 or 1 at a threshold of 3400 bytes (strict) or 2600 (mild); p̄(large|x) is ½ between them.

    What the tilt by each comes to is the accuracy of the exact target at λ = 1: Σ p̂(large|x) p(large|x,c) / Σ p̂(large|x) over
    new images. By p̄ it is 0.71 for 'strict' where it should be 1; 'mild' loses nothing, for all that p̄ takes is large to it.
    """
    images = np.stack([np.asarray(image) for image, _ in draw_with_rules(400, seed=1)])
    sizes = measure(jpeg_size, images)
    average = np.where(sizes >= 3400, 1.0, np.where(sizes >= 2600, 0.5, 0.0))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    clear = np.min([abs(sizes - THRESHOLD - shift) for shift in SHIFTS.values()], axis=0) > 100
    between = (sizes >= 2600) & (sizes < 3400) & clear
    networks = {}
    for prompt_conditional in (True, False):
        (tmp_path / str(prompt_conditional)).mkdir()
        networks[prompt_conditional] = _fitted(
            tmp_path / str(prompt_conditional), prompt_conditional=prompt_conditional
        )
    for word, shift in SHIFTS.items():
        truth = (sizes >= THRESHOLD + shift).astype(float)
        prompts = [f"a red circle {word}"] * len(images)
        with torch.no_grad():
            told = networks[True](pixels, prompts).double().softmax(1)[:, 1].numpy()
            blind = networks[False](pixels, None).double().softmax(1)[:, 1].numpy()
        assert abs(told - truth)[clear].mean() < 0.03
        assert abs(blind - average)[clear].mean() < 0.05
        assert blind[between].mean() == pytest.approx(0.5, abs=0.08)
        predicted = average @ truth / average.sum()
        assert predicted == pytest.approx(0.706 if word == "strict" else 1.0, abs=0.001)
        assert blind @ truth / blind.sum() == pytest.approx(predicted, abs=0.05)
        assert told @ truth / told.sum() > 0.95
