"""Every command tries its output before it does anything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctrl_ray import classify, compare, label, train, tune, verify

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("command", "option", "arguments"),
    [
        (train, "--output-dir", []),
        (train, "--output-dir", ["--dry-run"]),
        (train, "--tracker", []),
        (tune, "--output-dir", [str(ROOT / "tune_spaces" / "kl_guidance.py")]),
        (classify, "--output-dir", []),
        (compare, "--output-dir", []),
        (label, "--output", ["--images", "."]),
        (label, "--images", ["--output", "data.parquet", "--draw-shapes", "3"]),
        (verify, "--output-dir", []),
        (verify, "--output-dir", ["--adapter", "nowhere"]),
    ],
)
def test_an_output_that_cannot_be_written_is_named_first(
    command: object,
    option: str,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Status 2, the option, the place; nothing is made, and no Ray is started."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").write_text("a file, where a folder is meant")
    monkeypatch.setattr("ray.init", lambda **_: pytest.fail("Ray was started"))
    place = "aim:results/new" if option == "--tracker" else "results/new"
    assert command.main([*arguments, option, place]) == 2  # type: ignore[attr-defined]
    error = capsys.readouterr().err
    assert f"output 'results/new' of {option} cannot be written: {tmp_path}/results is a file" in error
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_an_output_of_a_plan_for_other_machines_is_not_tried(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is where they are."""
    assert train.main(["--dry-run", "--machines", "1x1x24GB", "--output-dir", "/proc/run"]) == 0
    assert "machines   " in capsys.readouterr().out
