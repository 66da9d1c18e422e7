"""`python -m ctrl_ray.compare`: what the user can get wrong is one error before anything starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ctrl_ray import compare as command
from ctrl_ray.compare import CompareOptions, compare
from ctrl_ray.config.presets import PRESETS, shapes
from ctrl_ray.errors import ConfigError, InterruptedRunError


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "dpss"], "--methods 'dpss' is not a method; did you mean 'dps'?"),
        (["--preset", "shapess"], "preset 'shapess' is unknown; expected one of shapes, "),
        (["--preset", "stable-diffusion"], "preset 'stable-diffusion' has no controls"),
        (["--adapters", "ctrl"], "--adapters 'ctrl' is not NAME=VALUE"),
        (["--adapters", "ctrl=nowhere"], "nowhere"),
        (["--classifier", "jpeg=x"], "--classifier names ['jpeg']; the preset has the controls ['jpeg_size']"),
        (["--classifier", "jpeg_size=x"], "--classifier jpeg_size=x holds no classifier.json"),
        (["--output-dir", "s3://bucket/x"], "output_dir of compare is 's3://bucket/x'; expected a folder"),
    ],
)
def test_a_mistake_is_one_message(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Status 2, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images of each method, and no folder."""
    assert command.main(["--quick", "--dry-run", "--output-dir", str(tmp_path / "new")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["method", "pre-trained", "CTRL"]
    assert not (tmp_path / "new").exists()


def test_a_comparison_that_is_stopped_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a training inside it would name --resume, which this command has not."""

    def stops(*_: Any) -> None:
        (tmp_path / "out" / "kept").write_text("")
        raise InterruptedRunError("go on with --resume")

    monkeypatch.setattr("ctrl_ray.comparison.run.run_comparison", stops)
    with pytest.raises(InterruptedRunError) as raised:
        compare(CompareOptions(output_dir=str(tmp_path / "out"), methods=("dps",)))
    assert str(raised.value) == (
        f"stopped; what was drawn, fitted and trained is in {tmp_path / 'out'}. Give the same command again to go on"
    )


def test_the_command_is_told_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run(question: Any, *_: Any) -> dict[str, Any]:
        asked.append(question)
        return {}

    monkeypatch.setattr("ctrl_ray.comparison.run.run_comparison", run)
    place = str(tmp_path / "my out")
    assert command.main(["--methods", "ctrl", "dps", "--seeds", "2", "--output-dir", place]) == 0
    (question,) = asked
    assert question.command == f"python -m ctrl_ray.compare --methods ctrl dps --seeds 2 --output-dir '{place}'"
    assert [plan.name for plan in question.plan.methods] == ["plain", "ctrl", "dps"]
    assert question.plan.methods[1].seeds == (0, 1) and question.config.tracker == "none"


def test_a_preset_without_a_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "mean", lambda: dataclasses.replace(shapes(), latent_reduction="mean"))
    with pytest.raises(ConfigError, match="has no target"):
        compare(CompareOptions(preset="mean"))
