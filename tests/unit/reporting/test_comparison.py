"""Comparing finished runs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from ctrl_ray import evaluate
from ctrl_ray.config import presets
from ctrl_ray.config.json import to_json
from ctrl_ray.errors import ConfigError, DataError
from ctrl_ray.evaluate import EvaluateOptions
from ctrl_ray.reporting.comparison import compare_runs, format_runs, is_monotone, read_run
from tests.pictures import texts


def _run(
    folder: Path,
    strength: float,
    accuracy: float | None,
    kl: float,
    *,
    gap: float | None = None,
    second: tuple[float, float] | None = None,
) -> Path:
    """second: strength and accuracy of a second control, which the pre-trained model hits in half."""
    base = presets.shapes()
    controls = {name: dataclasses.replace(c, guidance_strength=strength) for name, c in base.controls.items()}
    judged: dict[str, Any] = dict.fromkeys(controls, (accuracy, 0.25))
    if second is not None:
        control = next(iter(controls.values()))
        controls["colour"] = dataclasses.replace(control, guidance_strength=second[0])
        judged["colour"] = (second[1], 0.5)
    (folder / "report").mkdir(parents=True)
    (folder / "config.json").write_text(to_json(dataclasses.replace(base, controls=controls, kl_coef=2.0)))
    before, after = (
        {name: {"accuracy": values[side], "standard_errors": {"accuracy": 0.02}} for name, values in judged.items()}
        for side in (1, 0)
    )
    mean = None if accuracy is None else float(np.mean([values[0] for values in judged.values()]))
    numbers = {"accuracy": mean, "kl": kl, "prompt_fidelity": None, "diversity": 0.2, "controls": after}
    numbers |= {"standard_errors": {"accuracy": 0.02, "kl": 0.1}}
    numbers |= {} if gap is None else {"gap": gap, "gap_standard_error": 0.2}
    summary = {"before": {"accuracy": 0.25, "controls": before}, "after": numbers}
    (folder / "report" / "summary.json").write_text(json.dumps(summary))
    return folder


def test_runs_are_ordered_by_their_exponent_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], figures: dict[str, Figure]
) -> None:
    """Through the command line: exponent is guidance_strength / kl_coef; points with two standard errors."""
    folders = [_run(tmp_path / name, s, a, k) for name, s, a, k in (("b", 4.0, 0.8, 4.0), ("a", 1.0, 0.5, 1.0))]
    arguments = ["--runs", *map(str, folders), "--output-dir", str(tmp_path / "out")]
    assert evaluate.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.index("\na ") < printed.index("\nb ") and "0.5" in printed
    assert printed.count("yes") == 2
    assert (tmp_path / "out" / "guidance.png").is_file()
    accuracy, kl, against = figures["guidance.png"].axes
    np.testing.assert_allclose(accuracy.lines[0].get_xydata(), [[0.5, 0.5], [2.0, 0.8]])
    np.testing.assert_allclose(kl.lines[0].get_xydata(), [[0.5, 1.0], [2.0, 4.0]])
    np.testing.assert_allclose(against.lines[0].get_xydata(), [[1.0, 0.5], [4.0, 0.8]])
    (bars,) = accuracy.collections
    np.testing.assert_allclose(bars.get_segments(), [[[0.5, 0.46], [0.5, 0.54]], [[2.0, 0.76], [2.0, 0.84]]])
    assert texts(accuracy) == ["pre-trained"] and accuracy.texts[0].xy == (0.5, 0.25)
    assert texts(against) == ["0.5", "2"]


def test_a_fall_beyond_two_standard_errors_is_told(tmp_path: Path) -> None:
    """Two standard errors of a difference of two runs."""
    assert is_monotone([0.5, 0.46, 0.9], [0.02, 0.02, 0.02])
    assert not is_monotone([0.5, 0.43], [0.02, 0.02])
    folders = [_run(tmp_path / name, s, a, k) for name, s, a, k in (("a", 1.0, 0.9, 1.0), ("b", 2.0, 0.5, 4.0))]
    runs, _ = compare_runs(folders, tmp_path / "out")
    assert "accuracy rises with it, within two standard errors: NO" in format_runs(runs)


def test_the_gap_is_in_the_table_where_it_is_known(tmp_path: Path) -> None:
    folders = [_run(tmp_path / "a", 1.0, 0.5, 1.0), _run(tmp_path / "b", 2.0, 0.8, 4.0, gap=2.125)]
    without = format_runs([read_run(folders[0])])
    assert "gap" not in without and "rises" not in without
    head, a, b = format_runs([read_run(folder) for folder in folders]).splitlines()[:3]
    place = head.index("gap / nats") + len("gap / nats")
    assert a[:place].endswith("–") and b[:place].endswith("2.12 ± 0.20")


def test_every_control_stands_for_itself(tmp_path: Path, figures: dict[str, Figure]) -> None:
    """The second control is at chance in both runs; only the first one's exponent differs."""
    folders = [
        _run(tmp_path / n, s, a, k, second=(4.0, 0.5)) for n, s, a, k in (("a", 1.0, 0.5, 1.0), ("b", 4.0, 0.8, 4.0))
    ]
    runs, _ = compare_runs(folders, tmp_path)
    head, _, second, *trends = format_runs(runs).splitlines()
    name = next(iter(presets.shapes().controls))
    columns = [f"γ / kl_coef of {name}", f"accuracy of {name}", "γ / kl_coef of colour", "accuracy of colour"]
    assert re.split(r"  +", head) == ["run", *columns, "mean accuracy", "KL / nats", "fidelity", "diversity"]
    cells = ["b", "2", "0.800 ± 0.020", "2", "0.500 ± 0.020", "0.650 ± 0.020", "4.00 ± 0.10", "–", "0.200"]
    assert re.split(r"  +", second) == cells
    assert [line.split(" rises")[0] for line in trends] == [f"accuracy of {name}", "kl"]
    accuracy, _, against = figures["guidance.png"].axes
    np.testing.assert_allclose(accuracy.lines[0].get_xydata(), [[0.5, 0.5], [2.0, 0.8]])
    levels = [list(each.get_ydata()) for each in accuracy.lines if each.get_linestyle() == "--"]
    assert levels == [[0.25, 0.25], [0.5, 0.5]]
    assert [0.5, 0.5] in [list(each.get_ydata()) for each in against.lines if each.get_marker() == "o"]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    """An unfinished run, a run without an oracle, one run alone, no run and no adapter."""
    good = _run(tmp_path / "good", 1.0, 0.5, 1.0)
    with pytest.raises(DataError, match="finished run"):
        compare_runs([good, tmp_path / "nowhere"], tmp_path)
    with pytest.raises(DataError, match="no control of the run has an oracle"):
        compare_runs([good, _run(tmp_path / "blind", 1.0, None, 1.0)], tmp_path)
    with pytest.raises(DataError, match="at least two"):
        compare_runs([good], tmp_path)
    with pytest.raises(ConfigError, match="give one of --adapter"):
        EvaluateOptions()
