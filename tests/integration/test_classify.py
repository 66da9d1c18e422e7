"""Stage 1 from drawn images to a calibrated classifier, on real Ray Train workers."""

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ray.util import placement_group_table

from ctrl_ray.classifiers.calibration import Temperature, calibration_metrics
from ctrl_ray.classifiers.classifier import ImageClassifier
from ctrl_ray.classifiers.examples import split_of
from ctrl_ray.cluster.abandoned_groups import give_back_abandoned_groups
from ctrl_ray.cluster.waiting import group_waits
from ctrl_ray.config import ClassifierConfig, ControlConfig, TrainConfig
from ctrl_ray.driver import classifier as driver_classifier
from ctrl_ray.driver.classifier import FitResult, fit_classifier
from ctrl_ray.errors import DataError, InterruptedRunError, ResourceError, RunFolderError
from ctrl_ray.offline.shapes import draw_dataset
from ctrl_ray.oracles import jpeg_size
from ctrl_ray.policy.backbones import load_backbone
from ctrl_ray.policy.decoder import to_uint8

pytestmark = pytest.mark.usefixtures("ray_session")

NUM_IMAGES, NUM_SAMPLES = 200, 40


class NoiseSampler:
    """A stand-in for the pipeline: noise of a strength that the seed decides."""

    def __call__(self, num: int, seed: int) -> Iterator[tuple[np.ndarray, Sequence[str]]]:
        rng = np.random.default_rng(seed)
        for start in range(0, num, 16):
            count = min(16, num - start)
            strength = rng.integers(2, 200, size=(count, 1, 1, 1))
            yield (rng.random((count, 32, 32, 3)) * strength).astype(np.uint8), ["a red circle"] * count


class ShortSampler(NoiseSampler):
    """Gives half of what it is asked for."""

    def __call__(self, num: int, seed: int) -> Iterator[tuple[np.ndarray, Sequence[str]]]:
        return super().__call__(num // 2, seed)


@pytest.fixture(scope="module")
def decoded(tiny_pipeline: Path) -> np.ndarray:
    """What the pipeline's VAE makes of the drawn images, image by image: uint8 (N, 32, 32, 3)."""
    decoder = load_backbone(str(tiny_pipeline)).load_decoder()
    rows = []
    for image, _ in draw_dataset(NUM_IMAGES, seed=3):
        pixels = (
            torch.from_numpy(np.array(image.resize((32, 32), Image.Resampling.LANCZOS))).permute(2, 0, 1)[None] / 255
        )
        with torch.no_grad():
            rows.append(to_uint8(decoder.decode(decoder.encode(pixels)))[0].numpy())
    return np.stack(rows)


@pytest.fixture(scope="module")
def config(tiny_pipeline: Path, decoded: np.ndarray) -> TrainConfig:
    sizes = [jpeg_size(Image.fromarray(image)) for image in decoded]
    thresholds = tuple(float(value) + 0.5 for value in np.unique(np.quantile(sizes, [0.33, 0.67]).round()))
    return TrainConfig(
        base_model=str(tiny_pipeline),
        controls={"size": ControlConfig(oracle="jpeg_size", thresholds=thresholds, unit="bytes")},
        data="shapes",
        num_drawn_images=NUM_IMAGES,
        seed=3,
        classifier=ClassifierConfig(
            epochs=3, batch_size=16, num_pipeline_samples=NUM_SAMPLES, split=(0.6, 0.2, 0.2), learning_rate=3e-3
        ),
    )


@pytest.fixture(scope="module")
def result(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> FitResult:
    folder = tmp_path_factory.mktemp("fit") / "classifier"
    return fit_classifier(config, "size", output_dir=folder, sample_pipeline=NoiseSampler())


def test_the_folder_holds_a_classifier_and_nothing_else(result: FitResult) -> None:
    assert sorted(os.listdir(result.folder)) == ["classifier.json", "model.safetensors", "reliability.png"]
    with Image.open(result.folder / "reliability.png") as image:
        assert image.format == "PNG"


def test_the_figures_are_those_of_the_rows_that_were_held_out(
    result: FitResult, config: TrainConfig, decoded: np.ndarray
) -> None:
    """The temperature split, decoded and labelled again here, one image at a time."""
    samples = np.concatenate([
        images for images, _ in NoiseSampler()(NUM_SAMPLES, int(np.random.SeedSequence([3, 1, 0]).generate_state(1)[0]))
    ])  # fmt: skip
    split = np.concatenate(
        [split_of(NUM_IMAGES, (0.6, 0.2, 0.2), 3), split_of(NUM_SAMPLES, (0.6, 0.2, 0.2), 3, salt=1)]
    )
    images = np.concatenate([decoded, samples])[split == 2]
    spec = config.controls["size"]
    labels = torch.tensor([spec.classify(jpeg_size(Image.fromarray(image))) for image in images])
    classifier = ImageClassifier.from_pretrained(result.folder)
    with torch.no_grad():
        log_probs = classifier.class_log_probs(torch.from_numpy(images).permute(0, 3, 1, 2) / 255)
    expected = calibration_metrics(log_probs, labels)
    assert result.num_rows["judged"] == len(images)
    assert result.after["accuracy"] == pytest.approx(expected["accuracy"], abs=1.5 / len(images))
    assert result.after["nll"] == pytest.approx(expected["nll"], abs=5e-3)
    assert result.after["nll"] <= result.before["nll"]
    assert (classifier.control, classifier.image_size, classifier.base_model) == ("size", (32, 32), config.base_model)


def test_two_workers_fit_the_same_classifier_as_one(result: FitResult, config: TrainConfig, tmp_path: Path) -> None:
    """Gradients are summed over the same batches; what is left is the order of float32 additions over 30 updates."""
    two = replace(config, classifier=replace(config.classifier, num_workers=2))
    both = fit_classifier(two, "size", output_dir=tmp_path, sample_pipeline=NoiseSampler())
    assert both.num_rows == result.num_rows
    one, other = (
        torch.cat([tensor.flatten() for tensor in ImageClassifier.from_pretrained(folder).state_dict().values()])
        for folder in (result.folder, tmp_path)
    )
    assert float((one - other).norm() / one.norm()) < 1e-3
    assert both.after["nll"] == pytest.approx(result.after["nll"], abs=5e-3)


def test_an_existing_classifier_is_not_overwritten(result: FitResult, config: TrainConfig) -> None:
    with pytest.raises(RunFolderError, match="already holds a classifier"):
        fit_classifier(config, "size", output_dir=result.folder, sample_pipeline=NoiseSampler())


@pytest.mark.full
def test_an_error_on_a_worker_reaches_the_user_as_it_is(config: TrainConfig, tmp_path: Path) -> None:
    short = replace(config, num_drawn_images=20, classifier=replace(config.classifier, epochs=1))
    with pytest.raises(DataError, match=f"gave {NUM_SAMPLES // 2} samples where {NUM_SAMPLES} were asked for"):
        fit_classifier(short, "size", output_dir=tmp_path, sample_pipeline=ShortSampler())
    assert os.listdir(tmp_path) == []


@pytest.mark.full
def test_a_fit_without_room_ends_and_leaves_nothing(config: TrainConfig, tmp_path: Path) -> None:
    """Ray Train would try for room for ever; afterwards it no longer does."""
    before, living = _reserved(), give_back_abandoned_groups()
    scaling = replace(config.scaling, cpus_per_worker=64, placement_timeout_s=3)
    with pytest.raises(
        ResourceError, match=r"asks for 64 CPUs; there: 1 node with 4 CPUs .*scaling\.placement_timeout_s \(3\)"
    ):
        fit_classifier(replace(config, scaling=scaling), "size", output_dir=tmp_path, sample_pipeline=NoiseSampler())
    assert os.listdir(tmp_path) == []
    deadline = time.monotonic() + 30
    while give_back_abandoned_groups() > living or _reserved() - before:
        assert time.monotonic() < deadline, _reserved() - before
        time.sleep(0.1)
    assert not group_waits()


def _reserved() -> set[str]:
    return {name for name, group in placement_group_table().items() if group["state"] != "REMOVED"}


@pytest.mark.full
def test_an_interrupted_fit_says_what_to_do_and_leaves_nothing(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at the first line of progress of a fit that would take an hour."""
    reserved = _reserved()

    def interrupt(line: str, **_: object) -> None:
        assert line.startswith("classifier of size: 240 images ready")
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(driver_classifier, "print", interrupt, raising=False)
    endless = replace(config, classifier=replace(config.classifier, epochs=100_000))
    with pytest.raises(InterruptedRunError, match=r"classifier of size was not fitted.* same command again .*--resume"):
        fit_classifier(endless, "size", output_dir=tmp_path, sample_pipeline=NoiseSampler())
    assert os.listdir(tmp_path) == []
    deadline = time.monotonic() + 30
    while _reserved() - reserved:
        assert time.monotonic() < deadline, _reserved() - reserved
        time.sleep(0.1)


def test_the_command_line_fits_labels_of_a_parquet_file(
    tmp_path: Path, tiny_pipeline: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels without an oracle: faint or strong noise; figures are printed and the folder is complete."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    from ctrl_ray.classify import main

    rng, rows = np.random.default_rng(0), []
    for index in range(120):
        buffer = io.BytesIO()
        Image.fromarray((rng.random((32, 32, 3)) * (200 if index % 2 else 20)).astype(np.uint8)).save(buffer, "PNG")
        rows.append({"image": buffer.getvalue(), "prompt": "a scene", "noise": index % 2})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    flags = f"--data {tmp_path}/data.parquet --control noise --classes faint strong --base-model {tiny_pipeline}"
    flags += (
        f" --output-dir {tmp_path}/out --classifier.epochs 8 --classifier.batch-size 16 --classifier.split 0.6 0.2 0.2"
    )
    flags += " --classifier.no-decode --classifier.num-pipeline-samples 0"
    assert main(flags.split()) == 0
    printed = capsys.readouterr().out
    assert "after scaling" in printed
    settings = json.loads((tmp_path / "out" / "classifier.json").read_text())
    assert settings["classes"] == ["faint", "strong"]
    found = settings["calibration"]
    assert found["after"]["accuracy"] > 0.9
    temperature = Temperature(**found["temperature"])
    assert settings["temperature"] == temperature.value
    assert (f"temperature {temperature.value:.4g} is not calibrated" in printed) is not temperature.is_determined
    assert (temperature.num_rows, sum(found["class_rows"]["all"])) == (found["num_rows"]["judged"], 120)
    assert found["class_rows"]["all"] == [60, 60]
    assert main(flags.split()) == 2  # the folder is taken
