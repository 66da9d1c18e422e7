"""`classify` on the driver: what goes to the fit, and what is printed, without a fit."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ctrl_ray.classifiers.worker import FitJob
from ctrl_ray.classify import main
from ctrl_ray.driver import classifier as driver
from ctrl_ray.driver.classifier import FitResult


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_pipeline: Path) -> Iterator[list[dict[str, Any]]]:
    """What each fit was asked for, once it is allowed; a stand-in answers in the place of the workers. The working directory
    holds `data.parquet` and `base`."""
    asked: list[dict[str, Any]] = []

    def run(job: FitJob, storage_path: str, folder: Path, quiet: bool) -> None:
        asked.append({**vars_of(job), "output_dir": str(folder)})

    def read_result(folder: Path) -> FitResult:
        metrics = {"accuracy": 0.5, "nll": 0.7}
        return FitResult(
            folder=folder, before=metrics, after=metrics, temperature=1.0, best_epoch=2,
            num_rows={"judged": 30}, doubts=("it is no good",),
        )  # fmt: skip

    monkeypatch.setattr(driver, "_run", run)
    monkeypatch.setattr(driver, "read_result", read_result)
    monkeypatch.setattr(driver, "connected", nullcontext)
    monkeypatch.chdir(tmp_path)
    Path("base").symlink_to(tiny_pipeline)
    rows = []
    for number in range(6):
        buffer = io.BytesIO()
        Image.fromarray(np.full((8, 8, 3), 40 * number, np.uint8)).save(buffer, "PNG")
        rows.append({"image": buffer.getvalue(), "stars": number % 3, "brightness": 40.0 * number})
    pq.write_table(pa.Table.from_pylist(rows), "data.parquet")
    yield asked


def vars_of(job: FitJob) -> dict[str, Any]:
    return {field.name: getattr(job, field.name) for field in dataclasses.fields(job)}


OWN_DATA = ("--data", "data.parquet", "--base-model", "base", "--output-dir", "out")
STARS = (*OWN_DATA, "--control", "stars", "--classifier.num-pipeline-samples", "0", "--classes")


def test_paths_are_absolute_before_anything_goes_to_a_worker(fitted: list[dict[str, Any]], tmp_path: Path) -> None:
    Path("clip").mkdir()
    assert main([*STARS, "a", "b", "c", "--classifier.network", "clip:clip"]) == 0
    [asked] = fitted
    config = asked["config"]
    assert config.data == str(tmp_path / "data.parquet")
    assert config.base_model == str((tmp_path / "base").resolve())
    assert config.classifier.network == f"clip:{tmp_path / 'clip'}"
    assert asked["output_dir"] == str(tmp_path / "out")


def test_the_doubts_are_the_last_lines(fitted: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STARS, "a", "b", "c"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "warning: classifier of stars: it is no good"


def test_a_label_that_depends_on_the_prompt_asks_for_a_classifier_that_sees_it(
    fitted: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """The command that `label` prints gives the flag; without it the fit begins with a warning."""
    import shlex

    from ctrl_ray.label import describe
    from ctrl_ray.offline.labelling import LabelledData

    oracle = "tests.prompt_rules:jpeg_size_by_prompt"
    data = LabelledData(
        output="shapes", num_rows=6, num_bad_rows=0, bad_rows_file="", oracles={"rule": oracle},
        values={"rule": np.arange(6.0)},
    )  # fmt: skip
    (line,) = [line for line in describe(data, 3).splitlines() if "ctrl_ray.classify" in line]
    words = [*shlex.split(line)[3:], "--base-model", "base", "--output-dir", "rule"]
    assert main(words) == 0
    assert "does not see the prompt" not in capsys.readouterr().out
    words.remove("--classifier.prompt-conditional")
    assert main([*words, "--overwrite"]) == 0
    assert "warning: classifier of rule: the oracle" in capsys.readouterr().out
    assert [asked["config"].classifier.prompt_conditional for asked in fitted] == [True, False]
    assert [asked["equal_classes"] for asked in fitted] == [3, 3]


def test_numbers_as_names_are_explained(fitted: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STARS, "1", "2", "3"]) == 0
    assert "ask for the class named '1' (index 0)" in capsys.readouterr().out
    assert main([*STARS, "a", "b", "c"]) == 0
    assert "index" not in capsys.readouterr().out


@pytest.mark.parametrize("prompts_file", [True, False])
def test_without_prompts_the_pipeline_is_sampled_with_the_empty_one(
    fitted: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], prompts_file: bool
) -> None:
    Path("prompts.txt").write_text("a red circle\n")
    flags = [*OWN_DATA, "--control", "brightness", "--thresholds", "100", "--oracle", "jpeg_size"]
    assert main([*flags, *(["--prompts-file", "prompts.txt"] if prompts_file else [])]) == 0
    [asked] = fitted
    assert asked["sample_pipeline"].prompts == (("a red circle",) if prompts_file else ("",))
    said = [line for line in capsys.readouterr().out.splitlines() if "empty prompt" in line]
    assert len(said) == (not prompts_file)
    assert not said or ("data.parquet has no prompts" in said[0] and "--prompts-file" in said[0])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--classes", "only"], "has 1 classes"),
        (["--classes", "a", "b\nc"], "line break"),
        (["--classes", "a", "a"], "twice"),
        (["--thresholds", "500"], "all 6 rows are of class '<500'"),
        (["--equal-classes", "3"], "has no oracle to measure it"),
        (["--equal-classes", "3", "--oracle", "jpeg_size", "--thresholds", "5", "7"], "has 3 classes already"),
        (["--equal-classes", "3", "--oracle", "jpeg_size", "--noised"], "--noised needs those of the control"),
        (["--classes", "a", "b", "c", "--classifier.prompt-conditional"], "'prompt'"),
        (["--classes", "a", "b", "c", "--data", "nowhere.parquet"], "nowhere.parquet"),
        (["--classes", "a", "b", "c", "--control", "my-stars"], "my-stars"),
    ],
)
def test_what_cannot_be_fitted_is_refused_before_ray_starts(
    fitted: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main([*STARS[:-1], *flags]) == 2
    assert words in capsys.readouterr().err and fitted == []


def test_a_classifier_that_is_there_is_not_fitted_over(
    fitted: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("out").mkdir()
    Path("out/classifier.json").touch()
    assert main([*STARS, "a", "b", "c"]) == 2
    assert "already holds a classifier" in capsys.readouterr().err and fitted == []
    assert main([*STARS, "a", "b", "c", "--overwrite"]) == 0


def test_a_command_that_label_prints_is_accepted(fitted: list[dict[str, Any]]) -> None:
    """Integer labels and measured numbers, of a table and of an oracle."""
    import shlex

    from ctrl_ray.label import describe
    from ctrl_ray.offline.labelling import LabelledData

    columns = pq.read_table("data.parquet").to_pydict()
    data = LabelledData(
        output="data.parquet", num_rows=6, num_bad_rows=0, bad_rows_file="", oracles={"size": "jpeg_size"},
        values={"stars": np.array(columns["stars"]), "brightness": np.array(columns["brightness"]),
                "size": np.arange(6.0), "same": np.array([2, 2])},
    )  # fmt: skip
    commands = [line for line in describe(data, 3).splitlines() if "ctrl_ray.classify" in line]
    assert len(commands) == 3, "where all labels are one there is nothing to fit"
    for number, line in enumerate(commands):
        assert main([*shlex.split(line)[3:], "--base-model", "base", "--output-dir", f"out{number}"]) == 0
    assert [asked["config"].controls[asked["control"]].num_classes for asked in fitted] == [3, 3, 0]
    assert [asked["equal_classes"] for asked in fitted] == [None, None, 3], (
        "what the oracle measures is only known later"
    )
    assert [asked["config"].classifier.num_pipeline_samples for asked in fitted] == [0, 0, 2000]
