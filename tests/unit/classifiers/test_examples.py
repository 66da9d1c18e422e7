from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from ctrl_ray.classifiers import worker
from ctrl_ray.classifiers.checks import check_fit
from ctrl_ray.classifiers.examples import BLOCK_ROWS, BlockWriter, Example, Examples, read_examples, split_of
from ctrl_ray.config import ClassifierConfig, ControlConfig, TrainConfig
from ctrl_ray.errors import ConfigError, DataError, ModelError

SHARES = (0.8, 0.1, 0.1)
NUM_ROWS = BLOCK_ROWS + 40


def _config(**classifier: object) -> TrainConfig:
    return TrainConfig(
        controls={"kind": ControlConfig(classes=("a", "b", "c"))},
        classifier=ClassifierConfig(decode=False, **classifier),  # type: ignore[arg-type]
    )


def _rows() -> list[Example]:
    """Row i is an 8 x 8 image whose pixels spell i, with the label i mod 3."""
    return [
        Example(np.full((8, 8, 3), (i // 256, i % 256, 7), dtype=np.uint8), f"prompt {i}", i % 3)
        for i in range(NUM_ROWS)
    ]


def test_splits_follow_the_shares_and_do_not_move_as_rows_are_added() -> None:
    split = split_of(20_000, SHARES, seed=5)
    assert np.bincount(split) / 20_000 == pytest.approx(SHARES, abs=0.01)  # four standard errors
    np.testing.assert_array_equal(split_of(500, SHARES, seed=5), split[:500])
    for other in (split_of(20_000, SHARES, seed=6), split_of(20_000, SHARES, seed=5, salt=1)):
        # Independent of the first: equal with probability 0.8² + 0.1² + 0.1² = 0.66.
        assert (other == split).mean() == pytest.approx(0.66, abs=0.015)


def test_one_writer_and_two_leave_the_same_rows(tmp_path: Path) -> None:
    for name, num_workers in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        for rank in range(num_workers):
            blocks = BlockWriter(_config(), "kind", tmp_path / name, torch.device("cpu"))
            told: list[int] = []
            assert blocks.write_data(_rows(), rank, num_workers, told.append) == NUM_ROWS
            assert told == [BLOCK_ROWS, NUM_ROWS]
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["data-000000.json", "data-000000.npy", "data-000001.json", "data-000001.npy"]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_driver_hears_how_many_images_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    told = worker._progress(cast(Any, SimpleNamespace(control="kind", say=lines.append)))
    told(256)
    assert lines == [], "not every block is worth a line"
    monkeypatch.setattr(worker, "_TELL_EVERY_S", 0.0)
    told(512)
    assert lines == ["classifier of kind: 512 images decoded and labelled"]


def test_equal_images_lie_on_the_same_side_of_the_splits(tmp_path: Path) -> None:
    """Every picture is there four times, far apart, with other prompts and labels; the others keep their side."""
    pictures = [
        Example(np.full((8, 8, 3), i, dtype=np.uint8), f"{time}", time % 3) for time in range(4) for i in range(99)
    ]
    BlockWriter(_config(), "kind", tmp_path, torch.device("cpu")).write_data(pictures, 0, 1)
    examples = Examples(tmp_path, len(pictures), 0, SHARES, seed=5)
    sides = np.empty(len(pictures), dtype=np.int64)
    for side, rows in enumerate(examples.rows.values()):
        sides[rows] = side
    np.testing.assert_array_equal(sides.reshape(4, 99), np.tile(split_of(99, SHARES, seed=5), (4, 1)))


def test_rows_come_back_by_number_across_blocks(tmp_path: Path) -> None:
    BlockWriter(_config(), "kind", tmp_path, torch.device("cpu")).write_data(_rows(), 0, 1)
    examples = Examples(tmp_path, NUM_ROWS, 0, SHARES, seed=0)
    assert len(examples) == NUM_ROWS
    wanted = np.array([BLOCK_ROWS + 3, 0, BLOCK_ROWS - 1, BLOCK_ROWS])
    images, prompts, labels = examples.batch(wanted)
    numbers = (images[:, 0, 0, 0] * 255).round() * 256 + (images[:, 1, 0, 0] * 255).round()
    assert numbers.tolist() == wanted.tolist()
    assert prompts == [f"prompt {i}" for i in wanted]
    assert labels.tolist() == [i % 3 for i in wanted]
    assert sorted(np.concatenate(list(examples.rows.values()))) == list(range(NUM_ROWS))


@pytest.mark.parametrize("num_samples", [0, 5])
def test_classes_of_equal_share_are_those_of_what_the_pipeline_draws(tmp_path: Path, num_samples: int) -> None:
    """Without samples of the data. The oracle measures the mean of the image: 0, 40, …, 200 and, of the samples, 60."""
    control = ControlConfig(oracle=f"{__name__}:brightness", unit="of 255")
    config = replace(_config(), controls={"kind": control})
    writer = BlockWriter(config, "kind", tmp_path, torch.device("cpu"))
    rows = [Example(np.full((8, 8, 3), 40 * i, np.uint8), "", None) for i in range(6)]
    writer.write_data(rows, 0, 1)
    drawn = np.stack([np.full((8, 8, 3), 20 * i + 60, np.uint8) for i in range(5)])
    if num_samples:
        writer.write_samples(lambda num, seed: [(drawn, [""] * num)], num_samples, 0, 1)
    examples = Examples(tmp_path, len(rows), num_samples, SHARES, seed=0)
    spec = examples.with_equal_shares(control, 2)
    border = 100.0  # the median of 60, 80, …, 140, and of 0, 40, …, 200
    assert spec == replace(control, thresholds=(border,))
    measured = [40 * i for i in range(6)] + [20 * i + 60 for i in range(num_samples)]
    assert examples.labels.tolist() == [int(value >= border) for value in measured]
    with pytest.raises(DataError, match=r"cannot be split into 9 classes of equal share.*--equal-classes [56]"):
        examples.with_equal_shares(control, 9)
    examples.values[:] = 3.0
    with pytest.raises(DataError, match=r"all \d numbers that 'tests.*:brightness' measures are 3: there is nothing"):
        examples.with_equal_shares(control, 2)


def brightness(image: Image.Image) -> float:
    """An oracle."""
    return float(np.asarray(image).mean())


def test_a_missing_block_says_what_to_do(tmp_path: Path) -> None:
    BlockWriter(_config(), "kind", tmp_path, torch.device("cpu")).write_data(_rows(), 0, 2)
    with pytest.raises(DataError, match="storage that all of them share"):
        Examples(tmp_path, NUM_ROWS, 0, SHARES, seed=0)


def test_drawn_images_are_cut_to_max_images_and_scaled() -> None:
    config = replace(_config(max_images=3), data="shapes", num_drawn_images=50)
    rows = list(read_examples(config, "kind", (24, 32)))
    assert [row.image.shape for row in rows] == [(24, 32, 3)] * 3
    assert all(row.label is None and row.prompt.startswith("a ") for row in rows)


@pytest.mark.parametrize(
    ("control", "changes", "error", "message"),
    [
        (ControlConfig(), {}, ConfigError, "has 0 classes; expected at least 2"),
        (ControlConfig(classes=("a", "b")), {"data": None}, ConfigError, "no data to fit one on"),
        (ControlConfig(classes=("a", "b")), {}, ConfigError, "has no labels of control 'kind'"),
        (ControlConfig(classes=("a", "b"), oracle="jpeg_size"), {}, ConfigError, "has no thresholds"),
        (ControlConfig(thresholds=(1.0,), oracle="jpeg_sise"), {}, ConfigError, "did you mean 'jpeg_size'"),
        (
            ControlConfig(thresholds=(1.0,)),
            {"classifier": ClassifierConfig(num_pipeline_samples=5)},
            ConfigError,
            "has no oracle to label them",
        ),
        (ControlConfig(thresholds=(1.0,), oracle="jpeg_size"), {"base_model": "./nowhere"}, ModelError, "nowhere"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_ray_starts(
    tiny_pipeline: Path, control: ControlConfig, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    config = TrainConfig(base_model=str(tiny_pipeline), data="shapes", controls={"kind": control})
    with pytest.raises(error, match=message):
        check_fit(replace(config, **changes), "kind")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="control 'other' is unknown"):
        check_fit(config, "other")
