"""Which exponent an adapter was trained for: from adapter.json, else from its run's config; else it is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctrl_ray.config import ControlConfig, SamplerConfig, TrainConfig
from ctrl_ray.config.json import to_json
from ctrl_ray.errors import ConfigError
from ctrl_ray.policy.adapter import AdapterInfo
from ctrl_ray.verification.target import joint_classes, log_tilts, trained_exponents
from tests.unit.verification.samples import HUE, LEVEL

CONTROLS = {"hue": HUE, "level": LEVEL}
CONFIG = TrainConfig(base_model="shapes", controls=CONTROLS, kl_coef=0.5)


def adapter_info(**training: Any) -> AdapterInfo:
    return AdapterInfo(
        base_model="shapes",
        base_revision=None,
        base_sha256="0",
        controls=CONTROLS,
        sampler=SamplerConfig(num_steps=2),
        scheduler={},
        lora=None,
        training=training,
    )


def _write(folder: Path, **changes: Any) -> Path:
    """The run's config.json; returns the adapter's folder, which need not exist."""
    config = dataclasses.replace(CONFIG, **changes)
    (folder / "config.json").write_text(to_json(config), encoding="utf-8")
    return folder / "adapter"


def test_exponents_are_strengths_over_kl_coef(tmp_path: Path) -> None:
    """adapter.json says it itself, or the run's config.json does."""
    assert trained_exponents(tmp_path / "adapter", adapter_info(kl_coef=4.0)) == {"hue": 0.5, "level": 0.25}
    assert trained_exponents(_write(tmp_path), adapter_info()) == {"hue": 4.0, "level": 2.0}
    assert trained_exponents(_write(tmp_path), adapter_info(kl_coef=4.0)) == {"hue": 0.5, "level": 0.25}


def test_controls_that_the_run_took_over_are_not_in_its_target(tmp_path: Path) -> None:
    assert trained_exponents(_write(tmp_path, controls={"level": LEVEL}), adapter_info()) == {"level": 2.0}


@pytest.mark.parametrize(
    ("changes", "training", "message"),
    [
        (None, {}, "kl_coef is None in its adapter.json.*does not exist.*config.json beside the adapter"),
        (None, {"kl_coef": 1.0, "latent_reduction": "mean"}, "latent_reduction mean.*expected latent_reduction sum"),
        ({"latent_reduction": "mean"}, {"kl_coef": 1.0}, "latent_reduction mean"),
        ({"controls": {"other": ControlConfig(classes=("x", "y"))}}, {}, r"\['other'\].*\['hue', 'level'\]"),
    ],
    ids=["unknown", "mean, by the adapter", "mean, by the run", "another run's"],
)
def test_an_unknown_exponent_is_refused(
    tmp_path: Path, changes: dict[str, Any] | None, training: dict[str, Any], message: str
) -> None:
    adapter = tmp_path / "adapter" if changes is None else _write(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        trained_exponents(adapter, adapter_info(**training))


def test_tilts_by_hand() -> None:
    """2 log p(hue) + ½ log p(level), of each joint class; never above 0, where a classifier's rounding is."""
    log_probs = {"hue": np.log([[0.25, 0.75]]), "level": np.log([[0.5, 0.3, 0.2]])}
    classes = joint_classes(CONTROLS)
    found = log_tilts(log_probs, {"hue": 2.0, "level": 0.5}, classes)
    expected = [
        2 * np.log((0.25, 0.75)[joint.labels[0]]) + 0.5 * np.log((0.5, 0.3, 0.2)[joint.labels[1]]) for joint in classes
    ]
    np.testing.assert_allclose(found, np.array(expected)[:, None])
    assert log_tilts({"hue": np.array([[1e-7, -20.0]])}, {"hue": 1.0}, joint_classes({"hue": HUE}))[0, 0] == 0
