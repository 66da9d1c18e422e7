import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ctrl_ray.baselines import labelled
from ctrl_ray.baselines.labelled import LabelledLatents, read_labelled
from ctrl_ray.classifiers.examples import SPLITS, BlockWriter, Examples, read_examples
from ctrl_ray.config import ClassifierConfig, ControlConfig, TrainConfig
from ctrl_ray.config.presets import shapes_two_controls
from ctrl_ray.errors import ConfigError, DataError
from ctrl_ray.offline.images import to_png
from ctrl_ray.policy.backbones import load_backbone

NUM_IMAGES = 40


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    """Two controls of the embedded example, and few images."""
    return dataclasses.replace(shapes_two_controls(), num_drawn_images=NUM_IMAGES, classifier=ClassifierConfig())


@pytest.fixture(scope="module")
def drawn(config: TrainConfig) -> LabelledLatents:
    return read_labelled(config)


def test_it_is_what_stage_1_fits_on(config: TrainConfig, drawn: LabelledLatents, tmp_path: Path) -> None:
    """Labels, prompts and splits of each control, and the decoded latents, are those of stage 1's blocks."""
    decoder = load_backbone("shapes").load_decoder(64)
    with torch.no_grad():
        images = decoder.decode(drawn.latents)
    for column, control in enumerate(("jpeg_size", "colourfulness")):
        folder = tmp_path / control
        folder.mkdir()
        writer = BlockWriter(config, control, folder, torch.device("cpu"))
        writer.write_data(read_examples(config, control, (64, 64)), 0, 1)
        examples = Examples(folder, NUM_IMAGES, 0, config.classifier.split, config.seed)
        stored, prompts, labels = examples.batch(np.arange(NUM_IMAGES))
        assert drawn.prompts == tuple(prompts) and torch.equal(drawn.labels[:, column], labels)
        assert {name: drawn.rows(name).tolist() for name in SPLITS} == {
            name: rows.tolist() for name, rows in examples.rows.items()
        }
        assert (stored - images).abs().max() <= 0.5 / 255 + 1e-4  # rounded to a byte
    assert drawn.num_classes == {"jpeg_size": 4, "colourfulness": 2}


def test_a_budget_is_the_first_images_of_a_larger_one(config: TrainConfig, drawn: LabelledLatents) -> None:
    few = dataclasses.replace(config, classifier=dataclasses.replace(config.classifier, max_images=16))
    found = read_labelled(few, ["colourfulness"])
    assert torch.equal(found.labels[:, 0], drawn.labels[:16, 1]) and found.prompts == drawn.prompts[:16]
    assert torch.equal(found.split, drawn.split[:16])
    torch.testing.assert_close(found.latents, drawn.latents[:16], rtol=0, atol=1e-5)


@pytest.fixture
def rated(tmp_path: Path, tiny_pipeline: Path) -> TrainConfig:
    """A Parquet file of grey images, the fourth equal to the first, with the labels of two controls."""
    rows = [{"image": _png(60 * (number % 3)), "stars": number % 3, "mood": number % 2} for number in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    base = TrainConfig(base_model=str(tiny_pipeline), data=str(tmp_path / "data.parquet"))
    stars, mood = ControlConfig(classes=("1", "2", "3")), ControlConfig(classes=("bad", "good"))
    return dataclasses.replace(base, controls={"stars": stars, "mood": mood})


def _png(grey: int) -> bytes:
    return to_png(Image.fromarray(np.full((32, 32, 3), grey, np.uint8)))


def test_columns_are_read_together_and_equal_images_share_a_side(rated: TrainConfig) -> None:
    found = read_labelled(rated, ["mood", "stars"])
    assert found.labels.tolist() == [[0, 0], [1, 1], [0, 2], [1, 0]]
    assert found.prompts == ("", "", "", "")
    assert torch.equal(found.latents[0], found.latents[3]) and found.split[0] == found.split[3]
    assert not torch.equal(found.latents[0], found.latents[1])


def test_pairs_have_no_prompts_and_all_else_is_the_same(config: TrainConfig) -> None:
    few = dataclasses.replace(config, num_drawn_images=8)
    pairs = dataclasses.replace(few, classifier=dataclasses.replace(few.classifier, ignore_prompts=True))
    whole, found = read_labelled(few, ["jpeg_size"]), read_labelled(pairs, ["jpeg_size"])
    assert found.prompts == ("",) * 8 and all(whole.prompts)
    assert torch.equal(found.latents, whole.latents) and torch.equal(found.labels, whole.labels)
    with pytest.raises(ConfigError, match="needs the prompts that classifier"):
        dataclasses.replace(pairs.classifier, prompt_conditional=True)


def test_progress_is_told(rated: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled, "_TELL_EVERY_S", 0.0)
    lines: list[str] = []
    read_labelled(rated, say=lines.append)
    assert lines == ["4 images encoded and labelled"]


def test_what_cannot_be_read(rated: TrainConfig, config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"\['moon'\].*\['mood', 'stars'\]"):
        read_labelled(rated, ["moon"])
    with pytest.raises(ConfigError, match="--data"):
        read_labelled(dataclasses.replace(rated, data=None))
    with pytest.raises(DataError, match="'stars' has no oracle"):
        read_labelled(dataclasses.replace(rated, data="shapes", num_drawn_images=2))
    above = dataclasses.replace(config.controls["jpeg_size"], thresholds=(1.0, 2.0, 3.0), classifier=None)
    with pytest.raises(DataError, match="all 4 images are of class '>=3'"):
        read_labelled(dataclasses.replace(config, controls={"jpeg_size": above}, num_drawn_images=4))


def test_an_oracle_is_told_the_prompts(
    config: TrainConfig, drawn: LabelledLatents, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the drawn example: the label is whether the prompt is one of a circle."""
    monkeypatch.setattr(
        "ctrl_ray.classifiers.examples.load_oracle", lambda name: lambda image, prompt: float("circle" in prompt)
    )
    rule = ControlConfig(oracle="mine:circle", thresholds=(0.5,))
    found = read_labelled(dataclasses.replace(config, controls={"circle": rule}))
    assert found.labels[:, 0].tolist() == [int("circle" in prompt) for prompt in drawn.prompts]
