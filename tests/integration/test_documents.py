"""What README and its kin show, run as a reader would run it: the documents' own lines, in the folder of one short run.

Only sizes are added, so that a run of minutes takes seconds, and names of folders are filled in.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter

import ctrl_ray
from ctrl_ray.config import ControlConfig, EvaluationConfig, TrainConfig
from ctrl_ray.config.presets import preset
from tests.classifiers import save_classifier
from tests.documents import ROOT, Block, block, own_commands

full = pytest.mark.full

FEW = ["--evaluation.log-z-samples", "16", "--evaluation.max-log-z-samples", "16", "--evaluation.num-pairs", "0"]
SHORT = ["--num-updates", "2", "--evaluation.every-updates", "0", "--evaluation.final-num-samples", "16", *FEW]
LINES = ["sample", "a page", "is it right?", "compare", "your photos"]
OF_EVALUATE = ["--num-samples", "16", "--log-z-samples", "16", "--max-log-z-samples", "16"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path, tiny_3_pipeline: Path) -> Iterator[Path]:
    """Where the reader is, with a model, photos and what the paper's experiment needs."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(tiny_pipeline, folder / "BASE")
    shutil.copytree(tiny_3_pipeline, folder / "BASE3")
    (folder / "photos").mkdir()
    for number in range(12):
        noise = np.random.default_rng(number).integers(0, 256, (36, 48, 3), dtype=np.uint8)
        photo = Image.fromarray(noise).resize((480, 360)).filter(ImageFilter.GaussianBlur(12 - number))
        photo.save(folder / "photos" / f"IMG_{number}.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def run(line: list[str] | str, *more: str, status: int = 0) -> None:
    """A command of ours, which has to end with that status."""
    words = shlex.split(line) if isinstance(line, str) else line
    ((name, arguments),) = own_commands([words])
    assert importlib.import_module(f"ctrl_ray.{name}").main([*arguments, *more]) == status, words


def run_block(found: Block, *more: str) -> None:
    """All commands of a block."""
    for name, arguments in own_commands(found.commands()):
        run(["python", "-m", f"ctrl_ray.{name}", *arguments], *more)


@pytest.fixture(scope="module")
def first_run(ray_session: None, place: Path) -> dict[str, str]:
    """README's first command; what the end of the run says is next."""
    (command,) = own_commands(block("README.md: python3 -m venv").commands())
    arguments = [*command[1], *SHORT, "--tracker", "none"]
    printed = _printed(["python", "-m", f"ctrl_ray.{command[0]}", *arguments], RAY_ADDRESS=_address())
    return _next(printed)


def _next(printed: str) -> dict[str, str]:
    """Commands by what they are for, from the end of a run's output."""
    _, _, said = printed.partition("\nnext\n")
    return dict(re.findall(r"^  (\S.*?) {2,}(.*)$", said, re.M))


def _address() -> str:
    import ray

    return str(ray.get_runtime_context().gcs_address)


@full
@pytest.mark.timeout(900)
def test_the_first_run_says_what_to_do_next(first_run: dict[str, str], place: Path) -> None:
    """Each line runs as it is printed, but for sizes; the page is left again, and the comparison of half an hour is planned."""
    assert list(first_run) == LINES
    run(first_run["sample"])
    assert len(list((place / "runs" / "shapes" / "samples").glob("*.png"))) == 16
    _look_at_the_page(first_run["a page"])
    run(first_run["is it right?"], "--num-samples", "16", status=1)  # not after two updates
    run(first_run["compare"], "--dry-run")
    run(first_run["your photos"])
    assert (place / "data.parquet").is_file()


def _look_at_the_page(line: str) -> None:
    server = subprocess.Popen(
        [sys.executable, *shlex.split(line)[1:], "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline().startswith("open http://127.0.0.1:")
    finally:
        server.terminate()
        assert server.wait(60) == 0


@full
@pytest.mark.timeout(900)
def test_samples(first_run: dict[str, str], place: Path) -> None:
    """Of candidates without training, and of a method that steers."""
    run_block(block("ctrl_ray/candidates/README.md: python -m ctrl_ray.sample"))
    (sample, evaluate) = block("ctrl_ray/baselines/README.md: python -m ctrl_ray.sample").commands()
    run(sample)
    run(evaluate, *OF_EVALUATE)
    for folder in ("resampled", "steered"):
        rows = [json.loads(line) for line in (place / folder / "manifest.jsonl").read_text().splitlines()]
        assert len(rows) == 16 and all((place / folder / row["file"]).is_file() for row in rows), folder
    assert "gap" in json.loads((place / "runs" / "dps" / "summary.json").read_text())["after"]


@full
@pytest.mark.timeout(900)
def test_python(first_run: dict[str, str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling, a run, a sweep, a method, a scheduler for stock pipelines."""
    few = EvaluationConfig(every_updates=0, final_num_samples=16, log_z_samples=16, max_log_z_samples=16, num_pairs=0)

    def short(name: str) -> TrainConfig:
        return dataclasses.replace(preset(name), num_updates=2, evaluation=few, tracker="none")

    monkeypatch.setattr(ctrl_ray, "preset", short)
    first = _execute("README.md: pipe = ")
    assert first["image"].size == (64, 64)
    assert 0 <= first["run"].summary["after"]["accuracy"] <= 1 and (place / "runs" / "stronger" / "report").is_dir()
    steered = _execute("ctrl_ray/baselines/README.md: pipe = ", FOLDER="runs/shapes/classifier/jpeg_size")
    assert len(steered["pipe"].controls["jpeg_size"]) == 4
    stock = _execute("ctrl_ray/policy/README.md: pipe = ", BASE="BASE3")
    assert isinstance(stock["pipe"].scheduler, ctrl_ray.AncestralFlowScheduler)


def _execute(name: str, **filled: str) -> dict[str, Any]:
    text, names = block(name).text, dict[str, Any](ctrl_ray=ctrl_ray)
    for word, value in filled.items():
        text = text.replace(f'"{word}"', repr(value)).replace(f": {word}", f": {value!r}")
    exec(compile(text, name, "exec"), names)
    return names


@pytest.mark.parametrize(
    "added",
    [
        pytest.param(
            [["--classifier.num-pipeline-samples", "128"], [*SHORT, "--tracker", "none"]], marks=full, id="short"
        ),
        pytest.param([[], []], marks=pytest.mark.slow, id="unchanged"),
    ],
)
@pytest.mark.timeout(3600)
def test_own_photos(ray_session: None, place: Path, capsys: pytest.CaptureFixture[str], added: list[list[str]]) -> None:
    """Twelve photos without prompts become an adapter by the three commands of README, and what is next runs too."""
    (place / "data.parquet").unlink(missing_ok=True)
    for made in ("classifier", "mine"):  # by the other tier, where both run
        shutil.rmtree(place / "runs" / made, ignore_errors=True)
    label, classify, train = block("README.md: python -m ctrl_ray.label").commands()
    assert block("ctrl_ray/offline/README.md: python -m ctrl_ray.label").commands() == [label, classify, train]
    run(label)
    run(classify, *added[0])
    capsys.readouterr()
    run(train, *added[1])
    steps = _next(capsys.readouterr().out)
    assert list(steps) == LINES
    run(steps["sample"])
    run(steps["compare"], *OF_EVALUATE)


@full
def test_plans(place: Path) -> None:
    """For machines that are not there; and without the model, a control or data, in processes that know no Ray. A plan for
    this machine needs a card."""
    save_classifier(place / "runs" / "of_two", "NAME", ControlConfig(oracle="jpeg_size", thresholds=(1400.0,)))
    pq.write_table(pa.table({"image": [b""], "prompt": ["a cat"]}), place / "planned.parquet")
    _, elsewhere = block("ctrl_ray/policy/README.md: python -m ctrl_ray.train --preset stable-diffusion").commands()
    filled = {"NAME=runs/classifier": "NAME=runs/of_two", "data.parquet": "planned.parquet"}
    without, _ = block("ctrl_ray/policy/README.md: python -m ctrl_ray.train --preset sdxl").commands()
    with ThreadPoolExecutor(2) as executor:
        there, nothing = executor.map(_printed, ([filled.get(word, word) for word in elsewhere], without))
    (shown,) = re.findall(r"^(fits +yes: .*)$", (ROOT / "ctrl_ray/policy/README.md").read_text(encoding="utf-8"), re.M)
    assert shown in there.splitlines(), "README shows what is printed"
    assert re.search(r"^fits +yes: ", nothing, re.M), nothing


def _printed(words: list[str], **environment: str) -> str:
    """By the command in a process of its own, which has to succeed."""
    done = subprocess.run(
        [sys.executable, *words[1:]], env=os.environ | environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
