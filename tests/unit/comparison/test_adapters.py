"""Adapters that are given: whether they fit the preset, and what makes their target another one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ctrl_ray.comparison import adapters
from ctrl_ray.comparison.adapters import adapter_note, check_given_adapter
from ctrl_ray.config import SamplerConfig, TrainConfig
from ctrl_ray.config.presets import preset
from ctrl_ray.errors import ConfigError


def info(**changes: Any) -> SimpleNamespace:
    config = preset("shapes")
    known = {
        "base_model": "shapes",
        "controls": config.controls,
        "sampler": config.sampler,
        "training": {"kl_coef": 1.0},
    }
    return SimpleNamespace(**(known | changes))


def given(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    monkeypatch.setattr(adapters, "read_adapter_info", lambda folder: info(**changes))


def config(classifier: Path) -> TrainConfig:
    base = preset("shapes")
    controls = {name: dataclasses.replace(c, classifier=str(classifier)) for name, c in base.controls.items()}
    return dataclasses.replace(base, controls=controls)


def test_one_that_fits_is_taken_by_its_absolute_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given(monkeypatch)
    assert check_given_adapter("ctrl", "run/adapter", preset("shapes")) == str(tmp_path / "run" / "adapter")


def test_one_of_another_task_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, controls={"stars": None})
    with pytest.raises(
        ConfigError, match=r"ctrl=x has the controls \['stars'\], but the preset compares \['jpeg_size'\]"
    ):
        check_given_adapter("ctrl", "x", preset("shapes"))
    given(monkeypatch, base_model="other")
    with pytest.raises(ConfigError, match="ctrl=x is of the base model other; expected shapes"):
        check_given_adapter("ctrl", "x", preset("shapes"))


def classifiers(tmp_path: Path, own: bytes, theirs: bytes) -> tuple[str, TrainConfig]:
    """(adapter with the classifier it was trained with, settings with the comparison's)."""
    for folder, weights in ((tmp_path / "own", own), (tmp_path / "adapter" / "classifier" / "jpeg_size", theirs)):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(weights)
    return str(tmp_path / "adapter"), config(tmp_path / "own")


def test_one_with_the_comparisons_target_has_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch)
    folder, settings = classifiers(tmp_path, b"weights", b"weights")
    assert adapter_note(folder, settings, "CTRL") is None


def test_every_difference_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, training={"kl_coef": 2.0}, sampler=SamplerConfig(num_steps=20))
    folder, settings = classifiers(tmp_path, b"weights", b"others")
    assert adapter_note(folder, settings, "CTRL") == (
        "CTRL: it was trained for λ = 2 of jpeg_size, not 4; it was trained for another sampler than the preset's; it was "
        "trained with another classifier of jpeg_size than the comparison's"
    )


def test_one_without_a_kl_has_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, training={"kl_coef": 0.0})
    folder, settings = classifiers(tmp_path, b"weights", b"weights")
    assert adapter_note(folder, settings, "mine") == (
        "mine: its exponents are not known (it was trained without a KL, or with another one)"
    )
